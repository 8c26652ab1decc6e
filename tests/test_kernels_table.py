"""Tests of triton_kernels/table.py. Oracle: the addresses and sizes of the tensors themselves."""

import dataclasses

import pytest
import torch

from butterfly_opt.triton_kernels import launch, table, write

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_rows_and_owners():
    lists = [[torch.zeros(size, device=DEVICE) for size in (1, 5000, 0, 2048)] for _ in range(2)]
    built = table.build_table("write", lists, [3, 1, 4, 1])
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in zip(*lists, strict=True)]
    expected = [[1, 0, 3], [5000, 1, 1], [0, 4, 4], [2048, 4, 1]]
    assert built.rows.tolist() == [row + pair for row, pair in zip(expected, addresses, strict=True)]
    assert built.owners.tolist() == [0, 1, 1, 1, 3]
    assert built.rows.dtype == torch.int64 and built.owners.dtype == torch.int32


@pytest.mark.parametrize("count", [1, 7, 8, 30])
def test_numbers_as_arguments_of_kernels(count):
    """As while a CUDA graph is captured."""
    numbers = [(-1) ** i * 7**i % (1 << 48) - (i == 3) for i in range(count)]
    filled = table._fill(numbers, DEVICE)
    assert filled.dtype == torch.int64 and filled.tolist() == numbers


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_tables_in_cuda_graphs():
    params, updates = [torch.zeros(5000, device=DEVICE)], [torch.ones(5000, device=DEVICE)]
    scalars = torch.tensor([[0.1, 0.1, 0.1, 1, 1, 1.0]], device=DEVICE)
    write.write_(write.write_table(params, updates), scalars)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write.write_(write.write_table(params, updates), scalars)
    for _ in range(2):
        graph.replay()
    assert torch.equal(params[0], 3 * updates[0])


def test_alignment_is_promised_only_where_it_holds():
    whole = torch.zeros(9, device=DEVICE)
    assert table.build_table("write", [[whole[:4], whole[4:]]]).aligned
    assert not table.build_table("write", [[whole[:4], whole[5:]]]).aligned


def test_table_knows_its_memory():
    params, updates = [torch.nn.Parameter(torch.zeros(3, device=DEVICE))], [torch.ones(3, device=DEVICE)]
    built = table.build_table("write", [params, updates])
    assert built.is_current() and built.is_for(params, updates)
    assert not built.is_for(params) and not built.is_for(params, params) and not built.is_for()
    assert not built.is_for([params[0][:2]], [updates[0][:2]])
    params[0].data = torch.zeros(3, device=DEVICE)
    assert not built.is_current()
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.kind = "moments"


def test_tables_are_not_used_on_copies(monkeypatch):
    class OnCuda:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(launch, "is_interpreting", lambda: True)
    with pytest.raises(ValueError, match="a table cannot be used on cuda:0 under TRITON_INTERPRET=1; unset it"):
        table.build_table("write", [[OnCuda()]])


def test_lists_are_refused():
    x = torch.zeros(4, 6, device=DEVICE)

    def check(*lists: list) -> None:
        named = list(zip(("grads", "outs"), lists, strict=False))
        table.check_lists(named, [table.STATE_DTYPES] * len(lists), "torch")

    check([x, x], [x, x])
    with pytest.raises(ValueError, match="grads must hold at least one tensor, got none"):
        check([], [])
    with pytest.raises(ValueError, match="outs must hold 2 tensors like grads, got 1"):
        check([x, x], [x])
    with pytest.raises(ValueError, match=r"grads\[1\] must be on a CUDA device, got meta; use torch"):
        check([x, x.to("meta")])
    with pytest.raises(ValueError, match=r"outs\[0\] must be on meta like grads\[0\], got"):
        check([x.to("meta")], [x])
    with pytest.raises(ValueError, match=r"grads\[0\] must be on a CUDA device, got meta"):
        check([x.to("meta")])
    with pytest.raises(ValueError, match=r"outs\[1\] must have shape \(4, 6\) like grads\[1\], got \(24,\)"):
        check([x, x], [x, x.view(-1)])
    with pytest.raises(TypeError, match=r"outs\[1\] must be one of torch.float32, got torch.bfloat16; use torch"):
        check([x, x], [x, x.bfloat16()])
    with pytest.raises(ValueError, match=r"outs\[0\] must be contiguous, got shape \(6, 4\) with strides"):
        check([x.view(6, 4)], [x.T])
    with pytest.raises(ValueError, match="streams must hold one number for each of 2 tensors, got 1"):
        table.build_table("write", [[x, x]], [0])
