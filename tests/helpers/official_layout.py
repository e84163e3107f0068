"""An independent forward pass over official state dicts, written from the architecture in docs/paper.md section 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def batch_norm(s: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, s[f"{name}.running_mean"], s[f"{name}.running_var"], s[f"{name}.weight"], s[f"{name}.bias"])


def conv(s: State, name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
    weight = s[f"{name}.weight"]
    return F.conv2d(x, weight, s.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups)


def n_blocks(s: State, stage: int) -> int:
    return 1 + max(int(k.split(".")[1]) for k in s if k.startswith(f"layer{stage}."))


def post_activation_block(s: State, n: str, x: torch.Tensor, stride: int, groups: int) -> torch.Tensor:
    basic = f"{n}.conv3.0.weight" not in s
    skip = (
        batch_norm(s, f"{n}.shortcut.1", conv(s, f"{n}.shortcut.0", x, stride)) if f"{n}.shortcut.0.weight" in s else x
    )
    x = batch_norm(s, f"{n}.conv1.1", conv(s, f"{n}.conv1.0", x, stride if basic else 1)).relu()
    x = batch_norm(s, f"{n}.conv2.1", conv(s, f"{n}.conv2.0", x, 1 if basic else stride, 1 if basic else groups))
    if not basic:
        x = batch_norm(s, f"{n}.conv3.1", conv(s, f"{n}.conv3.0", x.relu()))
    return (x + skip).relu()


def pre_activation_block(s: State, n: str, x: torch.Tensor, stride: int) -> torch.Tensor:
    basic = f"{n}.conv3.2.weight" not in s
    active = batch_norm(s, f"{n}.bn", x).relu()
    skip = conv(s, f"{n}.shortcut.0", active, stride) if f"{n}.shortcut.0.weight" in s else x
    x = conv(s, f"{n}.conv1", active, stride if basic else 1)
    x = conv(s, f"{n}.conv2.2", batch_norm(s, f"{n}.conv2.0", x).relu(), 1 if basic else stride)
    if not basic:
        x = conv(s, f"{n}.conv3.2", batch_norm(s, f"{n}.conv3.0", x).relu())
    return x + skip


def attention_block(s: State, n: str, x: torch.Tensor, window: int, dim_head: int) -> torch.Tensor:
    active = F.gelu(batch_norm(s, f"{n}.norm1", x))
    skip = conv(s, f"{n}.shortcut.0", active) if f"{n}.shortcut.0.weight" in s else x
    y = batch_norm(s, f"{n}.norm2", conv(s, f"{n}.conv", active))
    q = conv(s, f"{n}.attn.attn.to_q", y)
    k, v = conv(s, f"{n}.attn.attn.to_kv", y).chunk(2, 1)
    out = torch.zeros_like(q)
    table = s[f"{n}.attn.pos_embedding"]
    heads = q.shape[1] // dim_head
    for top in range(0, y.shape[2], window):  # one window at a time, score by score from the table
        for left in range(0, y.shape[3], window):
            cut = (..., slice(top, top + window), slice(left, left + window))
            qs, ks, vs = (t[cut].reshape(len(x), heads, dim_head, window * window) for t in (q, k, v))
            scores = torch.einsum("bhdi,bhdj->bhij", qs, ks) * dim_head**-0.5
            i = torch.arange(window * window)
            rows = i[None] // window - i[:, None] // window + window - 1
            columns = i[None] % window - i[:, None] % window + window - 1
            weights = (scores + table[rows, columns]).softmax(-1)
            values = torch.einsum("bhij,bhdj->bhdi", weights, vs)
            out[cut] = values.reshape(len(x), heads * dim_head, window, window)
    return conv(s, f"{n}.attn.attn.to_out.0", out) + skip


def logits(s: State, x: torch.Tensor, *, window: int = 4, dim_head: int = 64, groups: int = 1) -> torch.Tensor:
    """Official ResNet, ResNeXt, pre-activation ResNet or AlterNet: which one, the keys tell."""
    stem = "layer0.layer0" if "layer0.layer0.0.weight" in s else "layer0"
    large = s[f"{stem}.0.weight"].shape[-1] == 7
    x = conv(s, f"{stem}.0", x, 2 if large else 1)
    if f"{stem}.1.weight" in s:
        x = batch_norm(s, f"{stem}.1", x).relu()
    x = F.max_pool2d(x, 3, 2, 1) if large else x
    for stage in (1, 2, 3, 4):
        for i in range(n_blocks(s, stage)):
            n, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            if f"{n}.attn.pos_embedding" in s:
                x = attention_block(s, n, x, window, dim_head)
            elif f"{n}.bn.weight" in s:
                x = pre_activation_block(s, n, x, stride)
            else:
                x = post_activation_block(s, n, x, stride, groups)
    if "classifier.0.bn.weight" in s:
        x = batch_norm(s, "classifier.0.bn", x).relu()
    return F.linear(x.mean((2, 3)), s["classifier.0.dense.weight"], s["classifier.0.dense.bias"])


def keys(kind: str, depth: int, stem: str, n_msa: tuple[int, ...], window: int, groups: int = 1) -> list:
    """Names and shapes of the official state dict, in its order."""
    basic, pre = depth in (18, 34), kind != "resnet"
    expansion = 1 if basic else 4
    counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]
    if kind == "alternet" and depth != 18:
        counts = (3, 4, 6, 4)
    side = 7 if stem == "imagenet" else 3
    found: list = [("layer0.layer0.0.weight" if kind == "alternet" else "layer0.0.weight", (64, 3, side, side))]
    found += [] if pre else _norm("layer0.1", 64)
    channels = 64
    for stage, (blocks, width, m) in enumerate(zip(counts, (64, 128, 256, 512), n_msa), start=1):
        letters = "C" * (blocks - 2 * m) + "CM" * m
        for i, letter in enumerate(letters):
            n, out = f"layer{stage}.{i}", width * expansion
            if letter == "M":
                found += _attention(n, channels, out, expansion, (3, 6, 12, 24)[stage - 1] * 64, window)
            else:
                strided = stage > 1 and i == 0
                found += _conv_block(n, channels, width, out, basic, pre, strided, groups)
            channels = out
    found += _norm("classifier.0.bn", channels) if pre else []
    return [*found, ("classifier.0.dense.weight", (10, channels)), ("classifier.0.dense.bias", (10,))]


def _norm(name: str, width: int) -> list:
    fields = [(f"{name}.{field}", (width,)) for field in ("weight", "bias", "running_mean", "running_var")]
    return [*fields, (f"{name}.num_batches_tracked", ())]


def _attention(n: str, channels: int, out: int, expansion: int, inner: int, window: int) -> list:
    width = channels // expansion
    return [
        *_norm(f"{n}.norm1", channels), (f"{n}.conv.weight", (width, channels, 1, 1)), *_norm(f"{n}.norm2", width),
        (f"{n}.attn.pos_embedding", (2 * window - 1, 2 * window - 1)),
        (f"{n}.attn.attn.to_q.weight", (inner, width, 1, 1)), (f"{n}.attn.attn.to_kv.weight", (2 * inner, width, 1, 1)),
        (f"{n}.attn.attn.to_out.0.weight", (out, inner, 1, 1)), (f"{n}.attn.attn.to_out.0.bias", (out,)),
    ]  # fmt: skip


def _conv_block(
    n: str, channels: int, width: int, out: int, basic: bool, pre: bool, strided: bool, groups: int
) -> list:
    mid = width if groups == 1 else width * 4 * groups // 64
    shapes = [(width, channels, 3, 3), (out, width, 3, 3)]
    if not basic:
        shapes = [(mid, channels, 1, 1), (mid, mid // groups, 3, 3), (out, mid, 1, 1)]
    found: list = []
    if strided or channels != out:
        found += [(f"{n}.shortcut.0.weight", (out, channels, 1, 1)), *([] if pre else _norm(f"{n}.shortcut.1", out))]
    if pre:
        found += [*_norm(f"{n}.bn", channels), (f"{n}.conv1.weight", shapes[0])]
        for j, shape in enumerate(shapes[1:], start=2):
            found += [*_norm(f"{n}.conv{j}.0", shapes[j - 2][0]), (f"{n}.conv{j}.2.weight", shape)]
        return found
    for j, shape in enumerate(shapes, start=1):
        found += [(f"{n}.conv{j}.0.weight", shape), *_norm(f"{n}.conv{j}.1", shape[0])]
    return found
