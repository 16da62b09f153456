"""The competition's formats: files written here, read back, decided; what cannot be read is refused by name."""
import gzip
import sys

import pytest
import torch
from torch import nn

from advcourse.__main__ import main
from advcourse.certify.network import network
from advcourse.certify.vnnlib import read_vnnlib, safety_network, verify

onnx = pytest.importorskip("onnx", reason="needs the extra advcourse[vnnlib]")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from advcourse.certify.onnx_reader import read_onnx  # noqa: E402

# relu(x0) − relu(−x1) and its opposite, plus 1/4 on the first
W0, b0 = [[1.0, 0.0], [0.0, -1.0]], [0.0, 0.0]
W1, b1 = [[1.0, -1.0], [-1.0, 1.0]], [0.25, 0.0]


def write(path, nodes, constants, shape=(1, 2), out=2):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, out])],
        [numpy_helper.from_array(torch.tensor(v).numpy(), name) for name, v in constants.items()])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def small(path):
    """The network above as a chain of Sub, MatMul, Add, Relu, Gemm."""
    nodes = [helper.make_node("Sub", ["x", "zero"], ["s"]), helper.make_node("Flatten", ["s"], ["f"]),
             helper.make_node("MatMul", ["f", "W0"], ["m"]), helper.make_node("Add", ["m", "b0"], ["a"]),
             helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Gemm", ["r", "W1", "b1"], ["y"], transB=1)]
    return write(path, nodes, {"zero": [0.0, 0.0], "W0": torch.tensor(W0).T.tolist(), "b0": b0, "W1": W1, "b1": b1})


def prop(path, condition, box=((-1, 1), (-1, 1))):
    lines = [f"(declare-const {v}_{i} Real)" for v in "XY" for i in (0, 1)]
    lines += [f"(assert (>= X_{i} {low})) (assert (<= X_{i} {high})) ; a comment" for i, (low, high) in enumerate(box)]
    path.write_text("\n".join([*lines, condition]))
    return path


def f(x):
    h = (torch.as_tensor(x) @ torch.tensor(W0).T + torch.tensor(b0)).relu()
    return h @ torch.tensor(W1).T + torch.tensor(b1)


def test_the_network_read_is_the_network_written(tmp_path):
    model, shape = read_onnx(small(tmp_path / "net.onnx"))
    x = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert shape == (2,) and torch.allclose(model(x), f(x))
    zipped = tmp_path / "net.onnx.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "net.onnx").read_bytes()))
    assert torch.allclose(read_onnx(zipped)[0](x), f(x))


def test_convolutions_and_pooling_agree_with_torch(tmp_path):
    torch.manual_seed(0)
    want = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)).eval()
    nodes = [helper.make_node("Conv", ["x", "W", "b"], ["c"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
             helper.make_node("Relu", ["c"], ["r"]),
             helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
             helper.make_node("Flatten", ["p"], ["f"]), helper.make_node("Gemm", ["f", "V", "v"], ["y"], transB=1)]
    constants = dict(zip(["W", "b", "V", "v"], (p.detach().tolist() for p in want.parameters()), strict=True))
    model, shape = read_onnx(write(tmp_path / "c.onnx", nodes, constants, (1, 1, 8, 8)))
    x = torch.rand(3, *shape)
    assert torch.allclose(model(x), want(x), atol=1e-6)
    assert torch.allclose(network(model, shape)(x).float(), want(x), atol=1e-5)


# Y_0 = relu(x0) − relu(−x1) + 1/4 in [−3/4, 5/4], and Y_0 + Y_1 = 1/4.
@pytest.mark.parametrize(("condition", "verdict"), [
    ("(assert (<= Y_0 -0.80))", "unsat"),
    ("(assert (<= Y_0 -0.70))", "sat"),
    ("(assert (and (<= Y_0 0.1) (<= Y_1 0.1)))", "unsat"),
    ("(assert (<= Y_0 0.1)) (assert (<= Y_1 0.1))", "unsat"),
    ("(assert (and (<= Y_0 0.2) (<= Y_1 0.2)))", "sat"),
    ("(assert (or (>= Y_0 2.0) (>= Y_1 2.0)))", "unsat"),
    ("(assert (or (and (>= Y_0 2.0)) (and (>= Y_1 0.9) (<= Y_0 0.0))))", "sat"),
    ("(assert (>= (+ Y_0 (* 2.0 Y_1)) 1.3))", "unsat"),
    ("(assert (>= (+ Y_0 (* 2.0 Y_1)) 1.2))", "sat"),
    ("(assert (or (and (>= X_0 0.5) (<= Y_0 -0.3)) (and (<= X_0 -0.5) (<= Y_0 -0.8))))", "unsat"),
    ("(assert (or (and (>= X_0 0.5) (<= Y_0 -0.3)) (and (<= X_0 -0.5) (<= Y_0 -0.7))))", "sat"),
])
def test_verdicts(tmp_path, condition, verdict):
    found = verify(small(tmp_path / "n.onnx"), prop(tmp_path / "p.vnnlib", condition), time_limit=30)
    assert found.name == verdict
    if verdict == "sat":
        x, y = found.inputs, f(found.inputs.float()).double()
        assert any((case.lower <= x).all() and (x <= case.upper).all() and (case.A @ y <= case.b).all()
                   for case in read_vnnlib(tmp_path / "p.vnnlib", 2, 2))
        assert str(found).startswith("sat\n((X_0 ") and str(found).endswith(")")


def test_the_safety_network_is_positive_where_no_case_holds(tmp_path):
    cases = read_vnnlib(prop(tmp_path / "p.vnnlib", "(assert (or (and (<= Y_0 0.2) (<= Y_1 0.2)) (>= Y_0 1.0)))"), 2, 2)
    model, shape = read_onnx(small(tmp_path / "n.onnx"))
    x = torch.rand(500, 2, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    out, y = safety_network(network(model, shape), cases)(x), f(x.float()).double()
    for k, case in enumerate(cases):
        assert ((out[:, k] <= 0) == (y @ case.A.T <= case.b).all(1)).all()
    assert (out <= 0).any(0).all() and (out > 0).any(0).all()


def test_out_of_time_and_an_empty_box(tmp_path):
    net = small(tmp_path / "n.onnx")
    assert verify(net, prop(tmp_path / "p.vnnlib", "(assert (<= Y_0 -0.76))"), time_limit=0).name in ("timeout", "unsat")
    assert verify(net, prop(tmp_path / "q.vnnlib", "(assert (<= Y_0 5.0))", box=((1, -1), (0, 1)))).name == "unsat"


@pytest.mark.parametrize(("condition", "word"), [
    ("(assert (<= Y_7 0.0))", "Y_7"), ("(assert (<= Y_0 0.0)", "bracket"), ("(assert (<= (* Y_0 Y_1) 0.0))", "expression"),
    ("(assert (<= Y_0 X_0))", "inputs and outputs"), ("(assert (== Y_0 0.0))", "condition"),
    ("(assert (<= Y_0 nonsense))", "nonsense"),
])
def test_what_cannot_be_read_is_named(tmp_path, condition, word):
    path = prop(tmp_path / "p.vnnlib", condition)
    with pytest.raises(ValueError, match=word) as error:
        read_vnnlib(path, 2, 2)
    assert "p.vnnlib" in str(error.value)


def test_an_input_without_a_bound_is_refused(tmp_path):
    path = tmp_path / "p.vnnlib"
    path.write_text("(assert (>= X_0 0.0)) (assert (<= X_0 1.0)) (assert (>= X_1 0.0)) (assert (<= Y_0 0.0))")
    with pytest.raises(ValueError, match="bound"):
        read_vnnlib(path, 2, 2)


def test_networks_that_cannot_be_read_are_named(tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a network")
    with pytest.raises(ValueError, match=r"bad\.onnx"):
        read_onnx(bad)
    sigmoid = write(tmp_path / "s.onnx", [helper.make_node("Sigmoid", ["x"], ["y"])], {})
    with pytest.raises(ValueError, match="Sigmoid"):
        read_onnx(sigmoid)
    fork = write(tmp_path / "f.onnx", [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Add", ["a", "x"], ["y"])], {})
    with pytest.raises(ValueError, match="not a chain"):
        read_onnx(fork)


def test_without_the_package_onnx_the_extra_is_named(tmp_path, monkeypatch):
    net = small(tmp_path / "n.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="vnnlib"):
        read_onnx(net)


def test_the_command(tmp_path, capsys):
    net, path = small(tmp_path / "n.onnx"), prop(tmp_path / "p.vnnlib", "(assert (<= Y_0 -0.80))")
    assert main(["verify", str(net), str(path), "--timeout", "20"]) == 0
    assert capsys.readouterr().out == "unsat\n"
    assert main(["verify", str(net), str(tmp_path / "missing.vnnlib")]) == 2
    assert "missing.vnnlib" in capsys.readouterr().err
