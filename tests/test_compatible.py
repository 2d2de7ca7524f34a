"""Versions of one model have the same names, dtypes and shapes; the first difference is named."""

from __future__ import annotations

import pytest
from refleet.common.digest import digest_of
from refleet.common.errors import IncompatibleCheckpoint
from refleet.common.types import Manifest, TensorEntry, TensorSpec
from refleet.publisher.structure import compatible


def specs(*texts: str) -> dict[str, TensorSpec]:
    return {text.split()[0]: TensorSpec(text.split()[0], text.split()[1], (int(text.split()[2]),)) for text in texts}


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (["a F32 1", "b F32 2"], "tensor c F32[3] of v1 is missing from v2"),
        (["a F32 1", "aa I8 1", "b F32 2", "c F32 3"], "tensor aa I8[1] of v2 is extra: v1 has no such tensor"),
        (["a F32 1", "b F32 4", "c F32 3"], "tensor b is F32[4] in v2, but F32[2] in v1"),
        (["a BF16 1", "b F32 4", "c F32 3"], "tensor a is BF16[1] in v2, but F32[1] in v1; 1 further tensor differs"),
        (["z F32 1"], "tensor a F32[1] of v1 is missing from v2; 3 further tensors differ"),
    ],
)
def test_another_models_checkpoint_names_the_first_difference_and_counts_the_rest(new: list[str], says: str) -> None:
    earlier = Manifest.of(TensorEntry(spec, digest_of()) for spec in specs("a F32 1", "b F32 2", "c F32 3").values())
    with pytest.raises(IncompatibleCheckpoint) as caught:
        compatible(specs(*new), earlier, version="v2", earlier_version="v1")
    assert caught.value.what == says
    assert "another --model name" in caught.value.next and "--allow-structure-change" in caught.value.next
    compatible(specs("c F32 3", "a F32 1", "b F32 2"), earlier, version="v2", earlier_version="v1")
