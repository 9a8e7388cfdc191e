"""scripts/bench_paged.py on a CPU."""

import json

import numpy as np
import pytest
from cases import error
from test_scripts import run

import paxattn
from scripts import bench_paged as bench
from scripts.paged.peers import OURS, UNTOLD, heads_first, paged, triton, untold
from scripts.paged.shapes import SUITES, Shape, inputs


def test_end_to_end_on_a_cpu(tmp_path):
    given = ["2x40+3x1..90 H4/2 D16 page8", "50 H2/1 D32 page16 int8", "30@70 H4/2 D16 page8"]
    out, png = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--shapes", *given, "--rounds", 1, "--iterations", 2, "--implementation", "reference"]
    done = run(*options, "--json", out, "--plot", png, script="bench_paged.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert png.read_bytes().startswith(b"\x89PNG")
    told = json.loads(out.read_text(encoding="utf-8"))
    assert [row["shape"] for row in told["rows"]] == given
    for row in told["rows"]:
        for one in row["kernels"].values():
            if one["gbs"]:
                assert one["gbs"] == pytest.approx(row["bytes_read"] / (one["kernel_ms"] or one["wall_ms"]) / 1e6)
    right = [{name for name, one in row["kernels"].items() if one["gbs"]} for row in told["rows"]]
    assert right == [{"ours", "XLA gather"}, {"ours", "XLA gather"}, {"ours", "XLA gather", "dense"}]


@pytest.mark.parametrize(
    "shape",
    ["64 H2 D32", "2x40 H4/2 D16 page0", "2x40 H4/2 D16 page8 prefix12", "0x40 H4/2 D16 page8", "9..3 H4/2 D16 page8"],
)
def test_a_bad_shape_is_named(shape):
    with pytest.raises(ValueError, match=f"^--shapes: got '{shape}'"):
        Shape.parse(shape)


def test_a_bad_shape_ends_the_script():
    done = run("--shapes", "64 H2 D32", script="bench_paged.py")
    assert done.returncode == 2
    assert "'64 H2 D32'" in done.stderr


def test_all_rows_begin_with_a_prefix(monkeypatch):
    shape = Shape.parse("3x40+21 H4/2 D16 page8 prefix16")
    assert str(shape) == "3x40+21 H4/2 D16 page8 prefix16"
    assert shape.bytes_read == (16 + 3 * 24 + 5) * 2 * 2 * 2 * 16
    table = np.asarray(inputs(shape).page_table)
    assert (table[:, :2] == table[0, :2]).all()
    assert len({*table[:, 2:5].ravel().tolist()} - {0}) >= 9
    options = bench.arguments().parse_args(["--rounds", "1", "--iterations", "1"])
    told, attend = [], paxattn.paged_attention

    def recorded(*args, shared_prefix_len, **options):
        told.append(shared_prefix_len)
        return attend(*args, shared_prefix_len=shared_prefix_len, **options)

    monkeypatch.setattr(paxattn, "paged_attention", recorded)
    figures = bench.measure(shape, {OURS: paged("xla"), UNTOLD: untold("xla")}, options).figures
    assert figures[OURS].gbs
    assert figures[UNTOLD].gbs
    assert {*told} == {16, None}
    with pytest.raises(ValueError, match="prefix"):
        Shape.parse("40+16 H4/2 D16 page8 prefix16")


def test_a_wrong_kernel_is_not_timed():
    options = bench.arguments().parse_args(["--rounds", "1", "--iterations", "1"])
    wrong = lambda shape: lambda x: 1.05 * paged("reference")(shape)(x)
    makes = {OURS: wrong, "right": paged("reference")}
    figures = bench.measure(Shape.parse("3x20 H4/2 D16 page8"), makes, options).figures
    assert figures["right"].gbs
    assert figures[OURS].gbs is None
    assert figures[OURS].note.startswith("wrong")


def test_what_is_read_is_what_the_anchors_count():
    sizes = [Shape.parse(text).bytes_read for text in SUITES["anchors"]]
    assert sizes == [2**29] * 3 + [2**30] + [2**29] * 2 + [2**31, 2**28]
    shape = Shape.parse("3x20+5x7..30 H4/2 D32 page8 int8")
    x = inputs(shape)
    assert x.kv_lens.tolist() == shape.kv_lens
    assert shape.bytes_read == sum(shape.kv_lens) * 2 * (64 + 2 * 3)
    assert str(Shape.parse(str(shape))) == str(shape)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_the_triton_kernel_is_called_as_it_wants_to_be():
    pytest.importorskip("jax.experimental.pallas.ops.gpu.paged_attention")
    shape = Shape.parse("2x40+70 H4/2 D64 page16")
    x = inputs(shape)
    got = triton(16, shape, interpret=True)(heads_first(shape, x))
    assert error(got, paged("reference")(shape)(x)) < 0.01


def test_what_a_chunk_computes():
    shape = Shape.parse("3@5+9@4+2x7 H4/2 D32 page8")
    assert (shape.q_lens, shape.kv_lens) == ([3, 4, 1, 1], [5, 4, 7, 7])
    pairs = 3 + 4 + 5 + 1 + 2 + 3 + 4 + 7 + 7
    assert shape.flops == 4 * pairs * 4 * 32
    x = inputs(shape)
    assert x.cu_q_lens.tolist() == [0, 3, 7, 8, 9]
    assert x.q.shape == (9, 4, 32)
