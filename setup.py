"""Lists the packages, the one thing that pyproject.toml cannot say; everything else is there.

``conf/`` and ``assets/`` lie at the root of the repository and install as ``swd.conf`` and ``swd.assets``
(``package-dir`` in pyproject.toml), which automatic discovery does not see.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["swd", "swd.*"]), "swd.conf", "swd.assets"])
