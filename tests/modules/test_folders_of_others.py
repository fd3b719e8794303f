"""Every option of `model=` with the folder of every family: taken, or one line that names the options that fit."""

from __future__ import annotations

import re
from pathlib import Path

import families
import pytest
import skeletons

from swd.modules.backbones import known_families, load_family
from swd.modules.family_folder import FamilyFolder
from swd.modules.model_options import families_of_options
from swd.types import UserError

NAMES = [*families.FAMILIES, "wan22_5b", "wan22_a14b"]
ALSO = {"wan22_a14b": {"wan_low_noise"}}
"""Further families of a tiny pipeline's folder."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {name: families.save(name, root / name) for name in NAMES}


def test_every_family_has_an_option() -> None:
    assert set(families_of_options().values()) == set(known_families())


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_another_family_is_one_line_that_names_what_fits(name: str, folders: dict[str, Path]) -> None:
    own = {families.FAMILY[name]} | ALSO.get(name, set())
    fitting = {option for option, family in families_of_options().items() if family in own}
    for family in known_families():
        if family in own:
            assert FamilyFolder(family, str(folders[name])).channels == families.CHANNELS[name]
            continue
        with pytest.raises(UserError, match=r"^model\.path=\S+ .*model\.family=") as caught:
            FamilyFolder(family, str(folders[name]))
        message = str(caught.value)
        assert "\n" not in message and message.endswith(" fits this folder"), message
        assert set(re.findall(r"model=(\w+)", message)) == fitting, (family, message)


@pytest.mark.parametrize("option", ["sd35_medium", "flux2_klein_9b", "wan22_a14b_low"])
def test_of_one_family_s_options_the_one_of_the_published_size_is_named(option: str, tmp_path: Path) -> None:
    folder = skeletons.skeleton(option, tmp_path / option)
    with pytest.raises(UserError) as caught:
        FamilyFolder("sana", str(folder))
    named = re.findall(r"model=(\w+)", str(caught.value))
    assert named == (["wan22_a14b_high", "wan22_a14b_low"] if "a14b" in option else [option])


def test_a_damaged_folder_of_a_family_is_no_other_one(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["sd3"].rglob("*"):
        if file.is_file():
            new = tmp_path / file.relative_to(folders["sd3"])
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(file.read_bytes())
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"patch_size": 2', '"patch_size": 0'))
    with pytest.raises(UserError) as caught:
        FamilyFolder("sd3", str(tmp_path))
    assert "fits this folder" not in str(caught.value)
    assert load_family("sd3").network_type == "SD3Transformer2DModel"
