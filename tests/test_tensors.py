"""torch tensors <-> bytes: every dtype, every bit, every way a tensor can lie in memory."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refleet.common.errors import DigestMismatch, UnreadableCheckpoint
from refleet.common.tensors import dtype_text, spec_of, tensor_blocks, tensor_bytes, tensor_from, torch_dtype
from refleet.common.types import DTYPE_BYTES, TensorSpec

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("text", DTYPE_BYTES)
def test_every_dtype_text_has_its_torch_dtype_and_back(text: str) -> None:
    dtype = torch_dtype(text)
    assert dtype_text(dtype) == text
    assert torch.empty(0, dtype=dtype).element_size() == DTYPE_BYTES[text]


@pytest.mark.parametrize("text", DTYPE_BYTES)
def test_every_bit_pattern_of_every_dtype_survives_both_ways(text: str) -> None:
    every_pair = np.arange(1 << 16, dtype=np.uint16).tobytes()
    spec = TensorSpec("w", text, (2, len(every_pair) // DTYPE_BYTES[text] // 2))
    tensor = tensor_from(bytearray(every_pair), spec)
    assert spec_of("w", tensor) == spec
    assert bytes(tensor_bytes(tensor)) == every_pair
    assert bytes(tensor_bytes(tensor[1])) == every_pair[len(every_pair) // 2 :]


def test_a_copy_keeps_the_bits_of_bools_that_are_neither_0_nor_1() -> None:
    data = bytes(range(256))
    tensor = tensor_from(bytearray(data), TensorSpec("w", "BOOL", (16, 16)))
    assert bytes(tensor_bytes(tensor.t())) == np.frombuffer(data, np.uint8).reshape(16, 16).T.tobytes()


def test_the_bytes_are_little_endian_and_in_c_order() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)
    assert tensor_bytes(tensor).hex() == "0100020003000400"
    assert tensor_bytes(tensor.t()).hex() == "0100030002000400"


def test_negative_zero_and_nan_payloads_keep_their_bits() -> None:
    bits = np.array([0x80000000, 0x7FC00001, 0xFFFFFFFF, 0x7F800001], dtype=np.uint32)
    assert bytes(tensor_bytes(torch.from_numpy(bits.view(np.float32)))) == bits.tobytes()


def test_a_contiguous_cpu_tensor_is_viewed_not_copied_and_not_writable() -> None:
    tensor = torch.zeros(8, dtype=torch.uint8)
    view = tensor_bytes(tensor[2:])
    tensor[2] = 7
    assert view[0] == 7
    assert view.readonly


def test_the_view_keeps_the_memory_alive() -> None:
    view = tensor_bytes(torch.full((1 << 20,), 5, dtype=torch.uint8))
    torch.full((1 << 20,), 6, dtype=torch.uint8)
    assert set(bytes(view)) == {5}


@given(st.data())
@settings(deadline=None)
def test_any_strides_give_the_bytes_of_the_contiguous_tensor(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    array = np.arange(int(np.prod(shape, dtype=int)), dtype=np.int32).reshape(shape)
    tensor = torch.from_numpy(array.copy())
    if shape:
        order = data.draw(st.permutations(range(len(shape))))
        steps = tuple(slice(data.draw(st.integers(0, 2)), None, data.draw(st.integers(1, 3))) for _ in shape)
        array, tensor = array.transpose(order)[steps], tensor.permute(order)[steps]
    assert bytes(tensor_bytes(tensor)) == array.tobytes()


def test_expanded_conjugated_and_negated_views_are_resolved() -> None:
    number = torch.tensor([1 + 2j], dtype=torch.complex64)
    assert bytes(tensor_bytes(number.conj())) == np.array([1 - 2j], dtype=np.complex64).tobytes()
    assert number.conj().imag.is_neg()
    assert bytes(tensor_bytes(number.conj().imag)) == np.array([-2], dtype=np.float32).tobytes()
    assert bytes(tensor_bytes(torch.tensor([3], dtype=torch.uint8).expand(4))) == b"\3\3\3\3"


def test_scalars_parameters_and_inference_tensors_are_tensors() -> None:
    assert bytes(tensor_bytes(torch.tensor(258, dtype=torch.int16))) == b"\2\1"
    assert bytes(tensor_bytes(torch.nn.Parameter(torch.zeros(1)))) == b"\0\0\0\0"
    with torch.inference_mode():
        made_for_inference = torch.ones(2, dtype=torch.bool)
    assert bytes(tensor_bytes(made_for_inference)) == b"\1\1"
    assert spec_of("s", torch.tensor(1.0)).shape == ()
    assert len(tensor_bytes(torch.empty(3, 0, 2))) == 0


def test_a_subclass_that_only_adds_methods_is_a_tensor() -> None:
    class Named(torch.Tensor):
        pass

    assert bytes(tensor_bytes(torch.tensor([7], dtype=torch.uint8).as_subclass(Named))) == b"\7"


def _dtensor() -> Iterator[object]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def _fake() -> object:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(2)


def _quietly(make: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that these are prototypes or on their way out
        return eval(make)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ("torch.ones(2).to_sparse()", "sparse_coo"),
        ("torch.ones(2, 2).to_sparse_csr()", "sparse_csr"),
        ("torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)", "quantized"),
        ("torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])", "nested"),
        ("torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)", "NestedTensor"),
        ("torch.ones(2, device='meta')", "meta device"),
        ("torch.nn.parameter.UninitializedParameter()", "not initialized"),
        ("_fake()", "FakeTensor"),
        ("torch.ones(2, dtype=torch.complex128)", "torch.complex128"),
        ("torch.empty(2, dtype=torch.float4_e2m1fn_x2)", "torch.float4_e2m1fn_x2"),
        ("[1, 2]", "not a tensor but list"),
    ],
)
def test_what_has_no_plain_bytes_is_refused_by_name_with_a_way_out(make: str, reason: str) -> None:
    tensor = _quietly(make)
    with pytest.raises(UnreadableCheckpoint) as caught:
        spec_of("layer.weight", tensor)
    assert reason in caught.value.what
    assert "layer.weight" in caught.value.what
    assert caught.value.tensor == "layer.weight"
    assert caught.value.next
    with pytest.raises(UnreadableCheckpoint, match=reason):
        tensor_bytes(tensor)  # type: ignore[arg-type]


def test_a_dtensor_is_refused_because_it_is_only_a_part() -> None:
    for tensor in _dtensor():
        with pytest.raises(UnreadableCheckpoint, match=r"DTensor.*only a part") as caught:
            spec_of("w", tensor)
        assert "full_tensor" in caught.value.next


@pytest.mark.parametrize("name", ["", "a..b", "a\0b", "x" * 513, "\ud800"])
def test_a_name_that_can_not_name_a_tensor_is_refused(name: str) -> None:
    with pytest.raises(UnreadableCheckpoint, match="name"):
        spec_of(name, torch.ones(1))


def test_a_tensor_from_bytes_shares_their_memory() -> None:
    data = bytearray(8)
    tensor = tensor_from(memoryview(data), TensorSpec("w", "I32", (2, 1)))
    data[0] = 9
    assert tensor.tolist() == [[9], [0]]


def test_a_tensor_from_read_only_bytes_can_be_written_without_touching_them() -> None:
    data = bytes(4)
    tensor_from(data, TensorSpec("w", "I32", (1,))).add_(1)
    assert data == bytes(4)


def test_a_tensor_may_begin_at_any_address() -> None:
    data = bytearray(b"\0" + np.arange(3, dtype=np.int64).tobytes())
    assert tensor_from(memoryview(data)[1:], TensorSpec("w", "I64", (3,))).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 5)])
def test_zero_size_tensors_keep_their_shape(shape: tuple[int, ...]) -> None:
    assert tensor_from(b"", TensorSpec("w", "BF16", shape)).shape == shape


@pytest.mark.parametrize("size", [0, 7, 9])
def test_bytes_of_another_size_are_no_tensor(size: int) -> None:
    with pytest.raises(DigestMismatch, match=f"{size} bytes for w F32.*has 8"):
        tensor_from(bytearray(size), TensorSpec("w", "F32", (2,)))


def test_blocks_cut_the_bytes_without_gap_or_copy() -> None:
    tensor = torch.arange(10, dtype=torch.uint8)
    blocks = list(tensor_blocks(tensor, block_bytes=4))
    assert [bytes(block) for block in blocks] == [b"\0\1\2\3", b"\4\5\6\7", b"\x08\x09"]
    tensor[9] = 77
    assert blocks[2][1] == 77
    assert list(tensor_blocks(torch.empty(0))) == []


def test_importing_the_module_does_not_import_torch() -> None:
    assert run("import sys, refleet.common.tensors; print('torch' in sys.modules)") == "False"


def test_a_non_contiguous_tensor_is_copied_once() -> None:
    mib = run(
        "import torch; from refleet.common.tensors import tensor_bytes as b; b(torch.ones(4, 4).t())\n"
        # VmHWM, not ru_maxrss: that one starts with the peak of the process that started us
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10\n"
        "t = torch.ones(8192, 8192, dtype=torch.uint8).t(); before = peak(); v = b(t); print(peak() - before)"
    )
    assert 50 <= int(mib) <= 80  # the copy has 64


@needs_cuda
@pytest.mark.parametrize("text", DTYPE_BYTES)
def test_a_cuda_tensor_has_the_bytes_of_its_cpu_copy(text: str) -> None:
    spec = TensorSpec("w", text, (3, 1000))
    data = np.random.default_rng(1).bytes(spec.size_bytes)
    tensor = tensor_from(data, spec).to("cuda")
    assert bytes(tensor_bytes(tensor)) == data
    assert b"".join(bytes(block) for block in tensor_blocks(tensor, block_bytes=999)) == data
    elements = np.frombuffer(data, dtype=np.uint8).reshape(3, 1000, DTYPE_BYTES[text])
    turned = elements.transpose(1, 0, 2).tobytes()
    assert b"".join(bytes(block) for block in tensor_blocks(tensor.t(), block_bytes=1000)) == turned
