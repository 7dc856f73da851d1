"""Theory as executable checks: gradient flow, surrogates of SGD and closed-form predictions."""

from . import (
    flows as flows,
    sampling as sampling,
    shallow as shallow,
    stabilization as stabilization,
)
