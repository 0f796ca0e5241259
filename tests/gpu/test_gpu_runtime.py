"""What a GPU asks of every op: graphs, streams, other devices, no waiting, no recompiling, the same bits every time."""

import gc
import itertools
import weakref

import pytest
import torch
from common import DEVICE, KERNELS, OPS, allocated, assert_same_bits, needs_gpu, scaled
from emulated import EMULATED
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import clock_of
from v05.kernels import dispatch


class Listener(TorchDispatchMode):
    """Sends every op through torch's dispatcher, as torch.compile does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def strided(values):
    """The same values, every other element of something twice as long that holds NaN or -1 between them."""
    between = torch.full_like(values, float("nan") if values.is_floating_point() else -1)
    return torch.stack([values, between], -1)[..., 0]


def shifted(values):
    """The same values at an address that is a multiple of the element's size alone."""
    flat = torch.cat([values.new_zeros(1), values.flatten()])[1:]
    return flat.view(values.shape)


@pytest.mark.parametrize("op_name", dispatch.OPS)
@needs_gpu
def test_cuda_is_what_runs(op_name):
    assert dispatch.choose(op_name, "cuda") == ("triton" if op_name == "linear_logprob" else "cuda")


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_every_time(op, backend):
    data = op.make(scaled(300, 20))
    first = op(backend, data)
    for _ in range(33 if EMULATED else scaled(99, 2)):
        assert_same_bits(op(backend, data), first)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", [strided, shifted])
def test_inputs_of_any_layout(op, backend, layout):
    """But for Triton's sums over all tokens: where addresses are not those of 16 bytes, it adds up in another order."""
    data = op.make(scaled(300, 20))
    actual, expected = op(backend, data._make(map(layout, data))), op(backend, data)
    for name, value in expected.items():
        if backend == "triton" and value.ndim == 0:
            torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-6)
            actual[name] = value
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_through_the_dispatcher(op, backend):
    data = op.make(scaled(300, 20))
    with Listener():
        heard = op(backend, data)
    assert_same_bits(heard, op(backend, data))


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_the_host_does_not_wait(op, backend):
    data = op.make(300)
    op(backend, data)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(backend, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_a_graph_replays_with_new_values(op, backend):
    data = op.make(300)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            op(backend, data)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = op(backend, data)
    for _ in range(3):
        for values in data:
            if values.is_floating_point():
                values.copy_(values.roll(1, 0))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(replayed, op(backend, data))


@needs_gpu
def test_a_benchmark_s_graph_keeps_its_inputs():
    given = torch.ones(1000, device=DEVICE)
    held = weakref.ref(given)
    clock = clock_of([lambda values=given: (values * 2,)], DEVICE, graph=True)
    del given
    gc.collect()
    assert clock.how == "graph"
    assert held() is not None


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_two_streams(op, backend):
    batches = [op.make(size, seed) for seed, size in enumerate((2000, 1500))]
    expected = [op(backend, data) for data in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for i, (stream, data) in enumerate(zip(streams, batches, strict=True)):
            with torch.cuda.stream(stream):
                results.append((i, op(backend, data)))
    torch.cuda.synchronize()
    for i, result in results:
        assert_same_bits(result, expected[i])


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_another_device_than_the_current_one(op, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    data = op.make(300)
    result = op(backend, data._make(values.to("cuda:1") for values in data))
    assert torch.cuda.current_device() == 0
    assert_same_bits({name: value.to(DEVICE) for name, value in result.items()}, op(backend, data))


@needs_gpu
def test_a_new_length_compiles_nothing(op, monkeypatch):
    import triton

    compiled = []
    for size in (64, 65):
        op("triton", op.make(size))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told["repr"]))
    for size, seed in itertools.product((1, 2, 16, 31, 100, 1000, 1024, 4097), (0, 1)):
        op("triton", op.make(size, seed))
    assert not compiled


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_memory_is_given_back(op, backend):
    data = op.make(300)
    op(backend, data)
    before = allocated()
    for _ in range(10):
        op(backend, data)
    assert allocated() == before


@pytest.mark.parametrize("backend", KERNELS)
def test_torch_compile_traces_through(op, backend):
    if op.make(5).__class__.__name__ != "RaggedGroups":
        pytest.skip("what asks for gradients inside is compiled in the tests of the op")
    torch.compiler.reset()  # the function below counts as the same for every op
    data = op.make(scaled(300, 20))
    compiled = torch.compile(lambda given: op(backend, given), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(data), op(backend, data))
