"""Pages that open from disk and load nothing: reports of runs and evaluations, and votes side by side."""
