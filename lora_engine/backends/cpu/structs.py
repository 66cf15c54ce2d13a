"""The arguments of the CPU kernels of lora_engine._C, by the names of csrc/cpu/kernels.hpp.

That file says what each field is. The extension compares a class's fields with its struct when it
first sees the class, and raises TypeError where a name or the order differs.
Those of products with adapters are in lora_structs.py.
"""

from typing import NamedTuple, TypeAlias

Address: TypeAlias = int  # as of Tensor.data_ptr(); 0 is null


class DTypeCode:
    """One of the extension's dtypes."""


class ActivationCode:
    """One of the extension's activations."""


class RmsNormArgs(NamedTuple):
    x: Address
    residual: Address
    weight: Address
    y: Address
    h: Address
    rstd: Address
    rows: int
    heads: int
    cols: int
    x_stride: int
    residual_stride: int
    y_stride: int
    eps: float
    offset: float


class RmsNormBwdArgs(NamedTuple):
    dy: Address
    dh: Address
    h: Address
    weight: Address
    rstd: Address
    dx: Address
    dweight: Address
    rows: int
    heads: int
    cols: int
    dy_stride: int
    dh_stride: int
    h_stride: int
    dx_stride: int
    offset: float


class LayerNormArgs(NamedTuple):
    x: Address
    weight: Address
    bias: Address
    y: Address
    mean: Address
    rstd: Address
    rows: int
    cols: int
    x_stride: int
    y_stride: int
    eps: float


class LayerNormBwdArgs(NamedTuple):
    dy: Address
    x: Address
    weight: Address
    mean: Address
    rstd: Address
    dx: Address
    dweight: Address
    dbias: Address
    rows: int
    cols: int
    dy_stride: int
    x_stride: int
    dx_stride: int


class RopeHeads(NamedTuple):
    x: Address
    y: Address
    heads: int
    x_stride: int
    x_head_stride: int
    y_stride: int
    y_head_stride: int


class RopeArgs(NamedTuple):
    q: RopeHeads
    k: RopeHeads
    cos: Address
    sin: Address
    position_ids: Address
    table_dtype: DTypeCode
    tokens: int
    head_dim: int
    rotary_dim: int
    cos_stride: int
    sin_stride: int
    interleaved: bool
    inverse: bool


class GluArgs(NamedTuple):
    gate: Address
    up: Address
    y: Address
    rows: int
    cols: int
    gate_stride: int
    up_stride: int
    y_stride: int
    activation: ActivationCode


class GluBwdArgs(NamedTuple):
    dy: Address
    gate: Address
    up: Address
    dgate: Address
    dup: Address
    h: Address
    rows: int
    cols: int
    dy_stride: int
    gate_stride: int
    up_stride: int
    dgate_stride: int
    dup_stride: int
    h_stride: int
    activation: ActivationCode


class CrossEntropyArgs(NamedTuple):
    logits: Address
    target: Address
    loss: Address
    logprob: Address
    entropy: Address
    lse: Address
    correct: Address
    grad: Address
    grad_scale: Address
    rows: int
    cols: int
    stride: int
    grad_stride: int
    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float
    lse_given: bool


class AttentionArgs(NamedTuple):
    q: Address
    k: Address
    v: Address
    cos: Address
    sin: Address
    cu_seqlens: Address
    parents: Address
    o: Address
    lse: Address
    tokens: int
    sequences: int
    q_heads: int
    kv_heads: int
    head_dim: int
    q_stride: int
    k_stride: int
    v_stride: int
    o_stride: int
    window: int
    softmax_scale: float
    causal: bool


class AttentionDecodeArgs(NamedTuple):
    q: Address
    k: Address
    v: Address
    cos: Address
    sin: Address
    keys: Address
    values: Address
    slots: Address
    spans: Address
    cu_spans: Address
    o: Address
    sequences: int
    q_heads: int
    kv_heads: int
    head_dim: int
    q_stride: int
    k_stride: int
    v_stride: int
    o_stride: int
    cache_stride: int
    window: int
    softmax_scale: float


class AttentionBwdArgs(NamedTuple):
    fwd: AttentionArgs
    d_o: Address
    dq: Address
    dk: Address
    dv: Address
    do_stride: int
    dq_stride: int
    dk_stride: int
    dv_stride: int


class AdamWArgs(NamedTuple):
    params: Address
    grads: Address
    exp_avg: Address
    exp_avg_sq: Address
    size: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bias_correction1: float
    bias_correction2: float
    grad_norm: Address
    max_grad_norm: float


class AdamW8bitArgs(NamedTuple):
    adamw: AdamWArgs
    exp_avg_absmax: Address
    exp_avg_sq_absmax: Address


class GradNormArgs(NamedTuple):
    grads: Address
    norm: Address
    size: int


class DropoutArgs(NamedTuple):
    x: Address
    y: Address
    rows: int
    cols: int
    x_stride: int
    y_stride: int
    p: float
    seed: int
    substream: int


class MatmulArgs(NamedTuple):
    a: Address
    b: Address
    addend: Address
    c: Address
    m: int
    n: int
    k: int
    a_stride: int
    b_stride: int
    addend_stride: int
    c_stride: int
    b_transposed: bool


class Quantize4bitArgs(NamedTuple):
    w: Address
    bounds: Address
    ascending: Address
    codes: Address
    absmax: Address
    size: int
    block: int


class Dequantize4bitArgs(NamedTuple):
    codes: Address
    absmax: Address
    nested_absmax: Address
    nested_code: Address
    offset: Address
    values: Address
    w: Address
    rows: int
    cols: int
    stride: int
    first: int
    block: int


class QuantizeKArgs(NamedTuple):
    w: Address
    codes: Address
    blocks: int
    bits: int


class DecodeScaledArgs(NamedTuple):
    codes: Address
    scale: Address
    zero: Address
    w: Address
    rows: int
    cols: int
    group: int
    codes_stride: int
    scale_stride: int
    zero_stride: int
    stride: int
    element: int
    zero_of_all: float
    factor: float


class DecodeBlocksArgs(NamedTuple):
    codes: Address
    w: Address
    rows: int
    cols: int
    codes_stride: int
    stride: int
    type: int
