"""TPUs that are not there: kernels interpreted on the CPU, and compiled by libtpu for a chip of each generation."""

import contextlib
import os

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

GENERATIONS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def slow(*parameters):
    return pytest.param(*parameters, marks=pytest.mark.slow)


def slow_but(everything, quick):
    return [one if one in quick else slow(one) for one in everything]


@contextlib.contextmanager
def interpreted():
    """Kernels that are called here run on the CPU; what is read before it is written is NaN, and races are errors."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        try:
            yield
            assert not interpret_pallas_call.races.races_found
        finally:
            pltpu.reset_tpu_interpret_mode_state()


def chips(generation):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install 'jax[tpu]'")
    # Read when libtpu is loaded: no machine to ask which TPU it has, and no lock, as nobody has one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(GENERATIONS[generation], platform="tpu").devices


def compile_for(generation, fn, *args):
    """Compile fn, jitted or not, for one chip; args are pytrees of ShapeDtypeStruct."""
    mesh = jax.sharding.Mesh(np.array(chips(generation)[:1]), ("chip",))
    return compile_over(mesh, fn, [jax.sharding.PartitionSpec()] * len(args), args)


def compile_over(mesh, fn, specs, args):
    """The same for the chips of a mesh, with a PartitionSpec an argument."""

    def place(spec, arg):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arg)

    placed = map(place, specs, args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which says what some of Pallas asks the device
        return (fn if hasattr(fn, "lower") else jax.jit(fn)).lower(*placed).compile()
