"""Functions of torch by what they do to the axes of their operands."""

from __future__ import annotations

#: functions of single elements of one tensor: every axis stays what it is
ELEMENTWISE = frozenset({
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "mish", "elu", "selu", "celu", "leaky_relu", "leaky_relu_",
    "softplus", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "hardtanh", "hardtanh_", "sigmoid",
    "sigmoid_", "tanh", "tanh_", "exp", "log", "sqrt", "rsqrt", "square", "abs", "neg", "__neg__", "erf", "clamp",
    "clamp_", "clamp_min", "clamp_max", "nan_to_num", "reciprocal", "dropout", "dropout_", "dropout2d", "dropout1d",
    "feature_dropout", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda", "contiguous",
    "clone", "detach", "requires_grad_", "zeros_like", "ones_like", "empty_like", "sin", "cos", "data", "logsigmoid",
    "hardshrink", "softsign", "positive", "alpha_dropout",
})  # fmt: skip
#: functions that scale the elements along an axis, which stays what it is
NORMALIZATIONS = frozenset({"softmax", "log_softmax", "normalize"})
#: functions of the elements of several tensors, which broadcast to one shape
BINARY = frozenset({
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "mul", "mul_",
    "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__rtruediv__", "__itruediv__", "pow", "__pow__",
    "__rpow__", "maximum", "minimum", "where", "masked_fill", "masked_fill_", "lerp", "addcmul", "addcdiv", "eq", "ne",
    "lt", "gt", "le", "ge", "__eq__", "__ne__", "__lt__", "__gt__", "rsub", "multiply", "subtract", "true_divide",
})  # fmt: skip
#: sums, means, norms and extreme values over some axes
REDUCTIONS = frozenset({
    "mean", "sum", "amax", "amin", "var", "std", "norm", "logsumexp", "prod", "vector_norm", "max", "min", "argmax", "argmin",
})  # fmt: skip
#: layers that normalize channels, with a scale and a shift
NORMS = frozenset({"layer_norm", "rms_norm", "batch_norm", "instance_norm", "group_norm"})
#: functions that resize, repeat or reorder the places of an axis, mostly of positions
RESIZES = frozenset({
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "upsample", "pad", "roll", "flip", "expand", "expand_as",
    "repeat", "broadcast_to", "repeat_interleave",
})  # fmt: skip
#: functions that keep the order of the entries and change the shape
RESHAPES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as", "squeeze", "unsqueeze"}
)
#: functions that change the order of the axes
PERMUTATIONS = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT"})
#: functions that cut a tensor into pieces along one axis
PIECES = frozenset({"chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"})
#: functions that take slices of a tensor along one axis
SLICES = frozenset({"unbind", "select", "narrow"})
#: products of matrices
PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "mm"})
#: functions that join tensors along one axis
JOINS = frozenset({"cat", "concat", "concatenate"})
