"""The students a recipe may train: MERT's two, and the laptop's."""

from ml_collections import ConfigDict

from configs import base, large, tiny


def sized(size: str) -> ConfigDict:
    """base.py, large.py or tiny.py by name; ValueError for another `size`."""
    known = {"base": base, "large": large, "tiny": tiny}
    if size not in known:
        raise ValueError(f"size is base, large or tiny, not {size!r}")
    return known[size].get_config()
