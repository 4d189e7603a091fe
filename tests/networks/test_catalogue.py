from __future__ import annotations

import timm

from adaptive.networks.catalogue import families, presets


def test_families_are_timms_own() -> None:
    """timm files registered models under the name of their module; the project's own are listed apart."""
    listed = {name for family in families() for name in timm.list_models(module=family)}
    assert listed
    assert listed.isdisjoint(presets())
