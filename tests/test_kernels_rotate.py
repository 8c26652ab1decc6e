"""Tests of triton_kernels/rotate.py and launch.py.

Oracles: up to n = 127 a dense float64 Q multiplied from explicit Givens matrices, which uses nothing of
the package; beyond, ``butterfly_opt.rotation`` in float64. Without a GPU the kernels run in Triton's
interpreter. ``BUTTERFLY_FULL_GRID=1`` runs every combination instead of a sample that covers all pairs.
"""

import itertools
import os

import pytest
import torch
from torch import Tensor

from butterfly_opt import rotation
from butterfly_opt.triton_kernels import launch
from butterfly_opt.triton_kernels.rotate import angle_gradient, can_use_rotate, rotate_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error of the norm. The kernels compute in float32 whatever the input, which is compared as
# rounded to its dtype; the looser bound allows for a kernel that one day multiplies in low precision.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
GRID = {
    "n": [1, 2, 3, 5, 31, 64, 100, 127, 1000, 1024, 4097],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "depth": [1, 2, 3],
    "pre_post": [(3, 1), (1, 5), (2, 3)],
    "transpose": [False, True],
    "stages": [None, 2],
}


FULL_GRID = os.environ.get("BUTTERFLY_FULL_GRID") == "1"


def covering(grid: dict[str, list]) -> list[tuple]:
    """Combinations in which each pair of values of two parameters occurs, chosen greedily; all if asked."""
    everything = list(itertools.product(*grid.values()))
    if FULL_GRID:
        return everything
    places = list(itertools.combinations(range(len(grid)), 2))

    def pairs(case: tuple) -> set:
        return {(i, j, str(case[i]), str(case[j])) for i, j in places}

    open_pairs = set().union(*(pairs(case) for case in everything))
    chosen = []
    while open_pairs:
        best = max(everything, key=lambda case: len(pairs(case) & open_pairs))
        chosen.append(best)
        open_pairs -= pairs(best)
    return chosen


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tiles grow as if the device had one multiprocessor: the interpreter pays for each program."""
    monkeypatch.setattr(launch, "MIN_PROGRAMS", 1)


def make(n: int, pre: int, post: int, depth: int = 1, stages: int | None = None, batch: tuple[int, ...] = ()):
    generator = torch.Generator().manual_seed(n + 7 * depth)
    angles = torch.randn(*batch, *rotation.angles_shape(n, depth=depth, stages=stages), generator=generator)
    x, y = torch.randn(2, *batch, pre, n, post, generator=generator)
    return x.to(DEVICE), y.to(DEVICE), angles.to(DEVICE)


def dense(angles: Tensor, n: int) -> Tensor:
    """Q in float64, one Givens matrix at a time."""
    q = torch.eye(n, dtype=torch.float64)
    for butterfly in angles.double().cpu():
        for stage, row in enumerate(butterfly):
            lowers = [i for i in range(n) if not i >> stage & 1 and i + 2**stage < n]
            for pair, i in enumerate(lowers):
                j, t = i + 2**stage, row[pair]
                left, right = q[:, i].clone(), q[:, j].clone()
                q[:, i] = left * t.cos() + right * t.sin()
                q[:, j] = right * t.cos() - left * t.sin()
    return q


def expected_rotation(x: Tensor, angles: Tensor, transpose: bool) -> Tensor:
    n = x.shape[-2]
    if n > 127:
        return rotation.rotate(x.double(), angles.double(), dim=-2, transpose=transpose).cpu()
    q = dense(angles, n)
    return (q.T if transpose else q) @ x.double().cpu()


def relative_error(result: Tensor, expected: Tensor) -> float:
    difference = result.double().cpu() - expected.double().cpu()
    return (difference.norm() / expected.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(list(GRID), covering(GRID))
def test_rotate_equals_oracle(n, dtype, depth, pre_post, transpose, stages):
    x, _, angles = make(n, *pre_post, depth, stages)
    x = x.to(dtype)
    result = rotate_columns(x, angles.cos(), angles.sin(), transpose=transpose)
    assert result.dtype == torch.float32 and result.shape == x.shape
    assert relative_error(result, expected_rotation(x, angles, transpose)) < TOLERANCE[dtype]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("pre, n, post, depth, max_tile", [(2, 31, 1, 2, 16), (1, 40, 5, 1, 32), (1, 40, 9, 1, 64),
                                                           (2, 100, 1, 2, 64), (1, 37, 3, 1, 32)])  # fmt: skip
def test_several_passes(pre, n, post, depth, max_tile, transpose):
    x, g, angles = make(n, pre, post, depth)
    cos, sin = angles.cos(), angles.sin()
    assert len(launch.stage_passes(angles.shape[-2], post=post, max_tile=max_tile)) > 1
    result = rotate_columns(x, cos, sin, transpose=transpose, max_tile=max_tile)
    assert relative_error(result, expected_rotation(x, angles, transpose)) < 1e-5
    if transpose:
        kept = x.clone(), g.clone()
        back = torch.empty_like(g)
        gradient = angle_gradient(x, g, cos, sin, max_tile=max_tile, out_input_gradient=back)
        expected = rotation.angle_gradient(x.double(), g.double(), angles.double(), dim=-2)
        assert relative_error(gradient, expected) < 1e-5
        assert relative_error(back, expected_rotation(g, angles, transpose=False)) < 1e-5
        assert torch.equal(x, kept[0]) and torch.equal(g, kept[1])


GRADIENT_GRID = {name: GRID[name] for name in ("n", "dtype", "depth", "pre_post")}
# The longest axis needs two passes beside other columns: as rows only, unless all is asked for.
GRADIENT_SAMPLE = [case for case in covering(GRADIENT_GRID) if FULL_GRID or case[0] < 4097 or case[3] == (3, 1)]


@pytest.mark.parametrize(list(GRADIENT_GRID), GRADIENT_SAMPLE)
def test_angle_gradient_equals_torch(n, dtype, depth, pre_post):
    u, g, angles = make(n, *pre_post, depth, stages=2 if pre_post == (2, 3) else None)
    u, g = u.to(dtype), g.to(dtype)
    cos, sin = angles.cos(), angles.sin()
    back = torch.empty_like(g, dtype=torch.float32)
    result = angle_gradient(u, g, cos, sin, out_input_gradient=back)
    expected = rotation.angle_gradient(u.double(), g.double(), angles.double(), dim=-2)
    assert result.shape == angles.shape
    assert relative_error(result, expected) < TOLERANCE[dtype]
    assert relative_error(back, expected_rotation(g, angles, transpose=False)) < TOLERANCE[dtype]
    assert torch.equal(result[expected.to(result.device) == 0], torch.zeros_like(result[expected == 0]))
    assert torch.equal(result, angle_gradient(u, g, cos, sin))


def test_angle_gradient_equals_autograd_of_the_dense_product():
    y, g, angles = (t.double().cpu() for t in make(6, 2, 3, 1))
    angles.requires_grad_()
    u = y
    for stage in range(3):
        matrix = torch.eye(6, dtype=torch.float64)
        for pair, i in enumerate(i for i in range(6) if not i >> stage & 1 and i + 2**stage < 6):
            j, t = i + 2**stage, angles[0, stage, pair]
            step = torch.zeros(6, 6, dtype=torch.float64)
            step[i, i] = step[j, j] = -1
            rows = torch.zeros_like(step)
            rows[i, i] = rows[j, j] = rows[i, j] = 1
            mask_diag, mask_up = torch.zeros_like(step), torch.zeros_like(step)
            mask_diag[i, i] = mask_diag[j, j] = 1
            mask_up[i, j], mask_up[j, i] = 1, -1
            matrix = matrix + step + mask_diag * t.cos() + mask_up * t.sin()
        u = matrix @ u
    (expected,) = torch.autograd.grad((u * g).sum(), angles)
    cos, sin = (f(angles.detach()).float().to(DEVICE) for f in (torch.cos, torch.sin))
    result = angle_gradient(u.detach().float().to(DEVICE), g.float().to(DEVICE), cos, sin)
    assert relative_error(result, expected) < 1e-5


def test_partial_sums_of_several_items_add_up(monkeypatch):
    monkeypatch.setattr(launch, "GOOD_TILE", 32)
    u, g, angles = make(16, 9, 1)
    tile = launch.choose_tile((1, 9, 16, 1), range(4), reduces=True)
    assert tile.items > launch.choose_workers(tile, 1)
    expected = rotation.angle_gradient(u.double(), g.double(), angles.double(), dim=-2)
    assert relative_error(angle_gradient(u, g, angles.cos(), angles.sin()), expected) < 1e-5


@pytest.mark.parametrize("pre", [None, 3])
def test_batch_has_angles_of_its_own(pre):
    x, g, angles = make(13, pre or 1, 4, 2, batch=(3,))
    if pre is None:
        x, g = x[:, 0], g[:, 0]
    cos, sin = angles.cos(), angles.sin()
    result = rotate_columns(x, cos, sin, transpose=True)
    gradient = angle_gradient(x, g, cos, sin)
    for b in range(3):
        assert relative_error(result[b], expected_rotation(x[b], angles[b], transpose=True)) < 1e-5
        expected = rotation.angle_gradient(x[b].double(), g[b].double(), angles[b].double(), dim=-2)
        assert relative_error(gradient[b], expected) < 1e-5


@pytest.mark.parametrize("count, max_tile", [(1, 16384), (2, 16384), (4, 16384), (3, 32)])
def test_lists_are_rotated_alike(count, max_tile):
    x, y, angles = make(21, 2, 1)
    columns = [x, y.bfloat16(), x + y, x - y][:count]
    results = rotate_columns(columns, angles.cos(), angles.sin(), max_tile=max_tile)
    assert len(results) == count
    for result, column in zip(results, columns, strict=True):
        assert relative_error(result, expected_rotation(column, angles, transpose=False)) < 1e-5
    assert rotate_columns([], angles.cos(), angles.sin()) == []


@pytest.mark.parametrize("max_tile", [16384, 32])
def test_in_place(max_tile):
    x, _, angles = make(40, 1, 3)
    expected = expected_rotation(x, angles, transpose=True)
    result = rotate_columns(x, angles.cos(), angles.sin(), transpose=True, out=x, max_tile=max_tile)
    assert result is x
    assert relative_error(x, expected) < 1e-5


def test_exact_cases():
    x = torch.arange(8.0, device=DEVICE).view(1, 8, 1)
    zero, one = torch.zeros(1, 3, 4, device=DEVICE), torch.ones(1, 3, 4, device=DEVICE)
    assert torch.equal(rotate_columns(x, one, zero), x)
    assert torch.equal(rotate_columns(x, -one, zero), -x)
    # A quarter turn in every stage of Q^T: (lo, hi) -> (hi, -lo).
    expected = torch.tensor([7.0, -6, -5, 4, -3, 2, 1, -0.0], device=DEVICE).view(1, 8, 1)
    assert torch.equal(rotate_columns(x, zero, one, transpose=True), expected)


@pytest.mark.parametrize("shape, stages", [((0, 6, 2), 3), ((2, 6, 0), 3), ((2, 1, 3), 0), ((2, 6, 3), 0)])
def test_nothing_to_rotate_copies(shape, stages):
    x = torch.randn(shape, device=DEVICE)
    cos = torch.ones(2, stages, shape[1] // 2, device=DEVICE)
    result = rotate_columns(x, cos, cos - 1)
    assert torch.equal(result, x) and (result.numel() == 0 or result.data_ptr() != x.data_ptr())
    back = torch.empty_like(x)
    assert torch.equal(angle_gradient(x, x, cos, cos - 1, out_input_gradient=back), torch.zeros_like(cos))
    assert torch.equal(back, x)


def test_stage_passes():
    assert launch.stage_passes(0, post=1) == []
    assert launch.stage_passes(13, post=1) == [range(13)]
    assert launch.stage_passes(14, post=1) == [range(7), range(7, 14)]
    assert launch.stage_passes(11, post=64) == [range(11)]
    assert launch.stage_passes(12, post=64) == [range(6), range(6, 12)]
    assert launch.stage_passes(24, post=1) == [range(13), range(13, 24)]
    with pytest.raises(ValueError, match="max_tile must be a power of two >= 16, got 24"):
        launch.stage_passes(3, post=1, max_tile=24)


@pytest.mark.parametrize("stages", range(1, 25))
@pytest.mark.parametrize("post, max_tile, reduces", [(1, 16384, False), (1, 16384, True), (3, 64, False), (9, 64, True),
                                                     (4096, 16384, True)])  # fmt: skip
def test_tiles_fit_and_cover(stages, post, max_tile, reduces, monkeypatch):
    monkeypatch.setattr(launch, "MIN_PROGRAMS", 264)
    n = 2**stages - (stages > 1)
    passes = launch.stage_passes(stages, post=post, max_tile=max_tile)
    assert [stage for used in passes for stage in used] == list(range(stages))
    for used in passes:
        tile = launch.choose_tile((2, 5, n, post), used, reduces=reduces, max_tile=max_tile)
        assert tile.elements <= max_tile
        assert tile.middle == 2 ** len(used)
        covered = tile.high_blocks * (1 if tile.shared_high else tile.group) * tile.middle * 2**used.start
        assert covered >= n
        runs = tile.low_blocks * tile.run_blocks * tile.run
        assert runs >= 2**used.start * post
        assert 32 * launch.choose_num_warps(tile.elements, 2) <= max(32, tile.elements)


def test_large_tiles_only_where_programs_remain(monkeypatch):
    monkeypatch.setattr(launch, "MIN_PROGRAMS", 264)
    small, large = (launch.choose_tile((1, rows, 256, 1), range(8)) for rows in (64, 65536))
    assert small.elements == launch.SMALL_TILE
    assert large.elements == launch.GOOD_TILE


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"columns": torch.float64}, TypeError, r"columns must be one of .*got torch.float64; use butterfly_opt"),
        ({"columns": torch.int64}, TypeError, r"columns must be one of .*got torch.int64"),
        ({"cos": torch.bfloat16}, TypeError, r"cos must be one of torch.float32, got torch.bfloat16"),
        ({"columns": "transposed"}, ValueError, r"columns must be contiguous, got shape \(2, 6, 4\)"),
        ({"columns": (6, 4)}, ValueError, r"columns must be \(pre, n, post\)"),
        ({"columns": (1, 2, 6, 4)}, ValueError, r"columns must be \(pre, n, post\)"),
        ({"columns": (2, 9, 4)}, ValueError, r"does not fit columns of shape \(2, 9, 4\): .*<= 4, 4"),
        ({"columns": (2, 0, 4)}, ValueError, r"does not fit columns"),
        ({"cos": (3, 3)}, ValueError, r"sin must have shape \(3, 3\)"),
        ({"cos": (3, 3), "sin": (3, 3)}, ValueError, r"cos must be \(depth, stages, n // 2\)"),
        ({"cos": (1, 4, 3), "sin": (1, 4, 3)}, ValueError, r"does not fit"),
        ({"cos": (3, 1, 3, 3), "sin": (3, 1, 3, 3)}, ValueError, r"must have the batch of cos, 3"),
        ({"sin": "meta"}, ValueError, r"sin must be on .*, got meta"),
        ({"columns": "meta", "cos": "meta", "sin": "meta"}, ValueError, r"columns must be on a CUDA device, got meta"),
    ],
)
def test_wrong_arguments(change, error, message):
    tensors = {"columns": torch.zeros(2, 6, 4), "cos": torch.ones(1, 3, 3), "sin": torch.zeros(1, 3, 3)}
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    assert can_use_rotate(tensors["columns"], tensors["cos"])
    for name, what in change.items():
        old = tensors[name]
        if what == "transposed":
            tensors[name] = old.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            tensors[name] = torch.zeros(what, device=DEVICE) if isinstance(what, tuple) else old.to(what)
    with pytest.raises(error, match=message):
        rotate_columns(**tensors)
    if set(change) != {"sin"}:
        with pytest.raises(error, match=message.replace("columns", "u")):
            angle_gradient(tensors["columns"], tensors["columns"], tensors["cos"], tensors["sin"])
        assert not can_use_rotate(tensors["columns"], tensors["cos"]) or "sin must have" in message


def test_wrong_companions():
    x, cos = torch.zeros(2, 6, 4, device=DEVICE), torch.ones(1, 3, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"grad_u must have shape \(2, 6, 4\) like u, got \(1, 6, 4\)"):
        angle_gradient(x, x[:1], cos, cos)
    with pytest.raises(ValueError, match=r"columns\[1\] must have shape \(2, 6, 4\)"):
        rotate_columns([x, x[:1]], cos, cos)
    with pytest.raises(ValueError, match="out must hold 2 tensors like columns, got 1"):
        rotate_columns([x, x], cos, cos, out=[x])
    with pytest.raises(TypeError, match=r"out must be torch\.float32, got torch\.bfloat16"):
        rotate_columns(x, cos, cos, out=x.bfloat16())
    with pytest.raises(ValueError, match=r"out must be contiguous, of shape \(2, 6, 4\).*got shape \(1, 6, 4\)"):
        rotate_columns(x, cos, cos, out=x[:1])
    with pytest.raises(ValueError, match="max_tile must be a power of two"):
        rotate_columns(x, cos, cos, max_tile=8)
