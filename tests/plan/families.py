"""Model families on which refit plans are proven: what is known to confuse weight maps, and real architectures.

Each entry makes a `Recipe`. Weights are random; sizes are small, since a plan does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from refleet.worker.recipe import Recipe
from torch import Tensor, nn

FAMILIES: dict[str, Callable[[], Recipe]] = {}


def family(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
    FAMILIES[make.__name__] = make
    return make


def recipe(module: nn.Module, *args: object, options: dict[str, object] | None = None, **kwargs: object) -> Recipe:
    return Recipe(module.eval(), args, kwargs, options={"min_block_size": 1, **(options or {})})


class Calls(nn.Module):
    """A module made of parts and the function that calls them."""

    def __init__(self, forward: Callable[..., Any], **parts: object):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)  # type: ignore[arg-type]
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


X = torch.randn(4, 8)
IMAGE = torch.randn(2, 3, 16, 16)
SEQUENCE = torch.randn(2, 6, 16)


# ---------------------------------------------------------------------- small, each with its own trap


@family
def mlp() -> Recipe:
    return recipe(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), X)


@family
def raw_parameters() -> Recipe:
    return recipe(Calls(lambda m, x: x * m.scale + m.shift, scale=parameter(8), shift=parameter(8)), X)


@family
def equal_zeros() -> Recipe:
    """Freshly initialised models are full of equal tensors."""
    zeros = {name: nn.Parameter(torch.zeros(8)) for name in "abc"}
    return recipe(Calls(lambda m, x: (x * m.a + m.b) * (x + m.c), **zeros), X)


@family
def folded_exp() -> Recipe:
    return recipe(
        Calls(lambda m, x: x * torch.exp(m.log_scale) + torch.sqrt(m.v), log_scale=parameter(8), v=parameter(8)), X
    )


@family
def sign_of_a_weight() -> Recipe:
    """With positive weights this looks like a constant."""
    return recipe(Calls(lambda m, x: x * torch.sign(m.w) + m.b, w=parameter(8), b=parameter(8)), X)


def _norms(**arguments: Any) -> Recipe:
    parts = {"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8, **arguments), "again": nn.Conv2d(8, 8, 1)}
    return recipe(Calls(lambda m, x: m.again(torch.relu(m.norm(m.conv(x)))), **parts), IMAGE)


@family
def batchnorm() -> Recipe:
    return _norms()


@family
def batchnorm_eps_1e3() -> Recipe:
    return _norms(eps=1e-3)


@family
def batchnorm_without_affine() -> Recipe:
    return _norms(affine=False)


@family
def batchnorm1d() -> Recipe:
    return recipe(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), X)


@family
def tied() -> Recipe:
    embedding, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = embedding.weight
    return recipe(Calls(lambda m, ids: m.head(torch.tanh(m.embedding(ids))), embedding=embedding, head=head),
                  torch.tensor([[1, 2, 3]]))  # fmt: skip


def _convolution(kind: type[nn.Module], *shape: int, **arguments: Any) -> Recipe:
    first, second = kind(4, 8, 3, **arguments), kind(8, 4, 2, **arguments)  # type: ignore[call-arg]
    return recipe(nn.Sequential(first, nn.ReLU(), second), torch.randn(2, 4, *shape))


@family
def conv1d() -> Recipe:
    return _convolution(nn.Conv1d, 12)


@family
def conv3d() -> Recipe:
    return _convolution(nn.Conv3d, 6, 6, 6)


@family
def conv_transpose1d() -> Recipe:
    return _convolution(nn.ConvTranspose1d, 12)


@family
def conv_transpose2d() -> Recipe:
    return _convolution(nn.ConvTranspose2d, 8, 8)


@family
def conv_transpose2d_grouped() -> Recipe:
    return _convolution(nn.ConvTranspose2d, 8, 8, stride=2, groups=2, bias=False)


@family
def group_norm() -> Recipe:
    return recipe(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), IMAGE)


@family
def instance_norm() -> Recipe:
    return recipe(nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 4, 1)), IMAGE)


@family
def encoder_layer() -> Recipe:
    return recipe(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), SEQUENCE)


@family
def deep_transformer() -> Recipe:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    return recipe(nn.TransformerEncoder(layer, 24, enable_nested_tensor=False), SEQUENCE)


@family
def lstm() -> Recipe:
    return recipe(Calls(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(16, 8, batch_first=True)), SEQUENCE)


@family
def gru_used_twice() -> Recipe:
    return recipe(Calls(lambda m, x: m.gru(m.gru(x)[0])[0], gru=nn.GRU(16, 16, batch_first=True)), SEQUENCE)


@family
def weight_norm() -> Recipe:
    return recipe(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), X)


@family
def fp16() -> Recipe:
    module = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)).half()
    return recipe(module, X.half())


@family
def bf16() -> Recipe:
    module = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)).bfloat16()
    return recipe(module, X.bfloat16())


@family
def position_and_class_tokens() -> Recipe:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.positions
        return m.head(x[:, 0])  # type: ignore[no-any-return]

    return recipe(
        Calls(forward, token=parameter(1, 1, 16), positions=parameter(1, 7, 16), head=nn.Linear(16, 4)), SEQUENCE
    )


@family
def weight_standardized_conv() -> Recipe:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.conv.weight
        mean, deviation = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (weight - mean) / (deviation + 1e-5), m.conv.bias)

    return recipe(Calls(forward, conv=nn.Conv2d(3, 8, 3)), IMAGE)


@family
def merged_lora() -> Recipe:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.base.weight + m.up @ m.down * 0.5, m.base.bias)

    return recipe(Calls(forward, base=nn.Linear(8, 8), up=parameter(8, 2), down=parameter(2, 8)), X)


@family
def chunked_qkv() -> Recipe:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in m.qkv(x).chunk(3, -1))
        return m.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))  # type: ignore[no-any-return]

    return recipe(Calls(forward, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16)), SEQUENCE)


@family
def dynamic_batch() -> Recipe:
    module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=32)},)
    return Recipe(module, (X,), dynamic_shapes=shapes, options={"min_block_size": 1})


@family
def bias_table() -> Recipe:
    """As in Swin: a table of biases, indexed by a buffer of integers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        bias = m.table[m.index.view(-1)].view(6, 6)
        return torch.softmax(x @ x.transpose(1, 2) + bias, -1) @ m.value(x)  # type: ignore[no-any-return]

    index = torch.randint(0, 11, (6, 6))
    return recipe(Calls(forward, table=parameter(11), index=index, value=nn.Linear(16, 16)), SEQUENCE)


@family
def rope_buffers() -> Recipe:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.query(x).chunk(2, -1)
        return torch.cat([left * m.cos - right * m.sin, left * m.sin + right * m.cos], -1)

    angles = torch.arange(6.0)[:, None] / 10 ** torch.arange(8.0)[None]
    return recipe(Calls(forward, query=nn.Linear(16, 16), cos=angles.cos(), sin=angles.sin()), SEQUENCE)


@family
def cast_in_forward() -> Recipe:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x.half(), m.linear.weight.half(), m.linear.bias.half()).float()

    return recipe(Calls(forward, linear=nn.Linear(8, 8)), X)


@family
def masked_weight() -> Recipe:
    mask = (torch.rand(8, 8) > 0.5).float()
    return recipe(
        Calls(lambda m, x: F.linear(x, m.linear.weight * m.mask, m.linear.bias), linear=nn.Linear(8, 8), mask=mask), X
    )


@family
def scalars() -> Recipe:
    parts = {name: nn.Parameter(torch.randn(())) for name in ("gain", "offset", "power")}
    return recipe(Calls(lambda m, x: x * m.gain + m.offset - m.power.exp(), **parts), X)


@family
def attention_with_kdim_vdim() -> Recipe:
    attention = nn.MultiheadAttention(16, 4, kdim=8, vdim=12, batch_first=True)
    module = Calls(lambda m, q, k, v: m.attention(q, k, v, need_weights=False)[0], attention=attention)
    return recipe(module, SEQUENCE, torch.randn(2, 5, 8), torch.randn(2, 5, 12))


@family
def several_outputs_and_keywords() -> Recipe:
    def forward(m: Any, x: Tensor, *, scale: Tensor) -> dict[str, object]:
        hidden = torch.tanh(m.first(x)) * scale
        return {"hidden": hidden, "rest": (m.second(hidden), hidden.sum(-1))}

    module = Calls(forward, first=nn.Linear(8, 8), second=nn.Linear(8, 2))
    return recipe(module, X, scale=torch.ones(1))


@family
def parts_in_torch() -> Recipe:
    """Some operations are left to PyTorch: their weights are not in any engine."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.first(x))
        hidden = torch.sort(hidden + m.shift)[0] * torch.exp(m.log_scale)
        return m.second(hidden)  # type: ignore[no-any-return]

    module = Calls(forward, first=nn.Linear(8, 8), second=nn.Linear(8, 2), shift=parameter(8), log_scale=parameter(8))
    return recipe(
        module, X, options={"torch_executed_ops": {"torch.ops.aten.sort.default", "torch.ops.aten.add.Tensor"}}
    )


# ---------------------------------------------------------------------- architectures


def _vision(name: str, size: int = 64, **arguments: Any) -> Recipe:
    import torchvision

    return recipe(getattr(torchvision.models, name)(**arguments), torch.randn(2, 3, size, size))


@family
def resnet18() -> Recipe:
    return _vision("resnet18")


@family
def resnet18_eps_1e3() -> Recipe:
    made = _vision("resnet18")
    for part in made.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-3
    return made


@family
def mobilenet_v3_small() -> Recipe:
    return _vision("mobilenet_v3_small")


@family
def efficientnet_b0() -> Recipe:
    return _vision("efficientnet_b0")


@family
def vision_transformer() -> Recipe:
    import torchvision

    module = torchvision.models.VisionTransformer(32, 8, 4, 4, 32, 64)
    nn.init.normal_(module.heads.head.weight)  # it starts at zero, and a comparison of zeros proves nothing
    return recipe(module, torch.randn(2, 3, 32, 32))


@family
def swin() -> Recipe:
    import torchvision

    return recipe(torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4]), torch.randn(1, 3, 64, 64))


class UNet(nn.Module):
    """Down twice, up twice by ConvTranspose, with skip connections."""

    def __init__(self, width: int = 8):
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.down1, self.down2, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.join2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), block(4 * width, 2 * width)
        self.up1, self.join1 = nn.ConvTranspose2d(2 * width, width, 2, 2), block(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.join2(torch.cat([self.up2(x), two], 1))
        x = self.join1(torch.cat([self.up1(x), one], 1))
        return self.head(x)  # type: ignore[no-any-return]


@family
def unet() -> Recipe:
    return recipe(UNet(), torch.randn(1, 3, 32, 32))


class Logits(nn.Module):
    """A transformers model as a function of token ids."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits  # type: ignore[no-any-return]


def language_model(kind: str, dtype: torch.dtype = torch.float32, *, tokens: int = 16, **sizes: Any) -> Recipe:
    """GPT-2, BERT or Llama from a config, with random weights and eager attention."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(attn_implementation="eager", **sizes)
    head = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM", "Llama": "LlamaForCausalLM"}[kind]
    model = getattr(transformers, head)(config).to(dtype)
    if kind == "Bert":
        ids = torch.arange(tokens)[None] % config.vocab_size
        module: nn.Module = Calls(lambda m, x: m.model(x).logits, model=model)
    else:
        ids, module = torch.arange(tokens)[None] % config.vocab_size, Logits(model)
    return recipe(module, ids)


@family
def gpt2() -> Recipe:
    return language_model("GPT2", n_layer=2, n_embd=32, n_head=2, vocab_size=128, n_positions=32)


@family
def gpt2_fp16() -> Recipe:
    return language_model("GPT2", torch.float16, n_layer=2, n_embd=32, n_head=2, vocab_size=128, n_positions=32)


@family
def bert() -> Recipe:
    return language_model(
        "Bert", num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=128,
        max_position_embeddings=32,
    )  # fmt: skip


@family
def llama() -> Recipe:
    return language_model(
        "Llama", num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=128,
    )  # fmt: skip


@family
def llama_bf16() -> Recipe:
    return language_model(
        "Llama", torch.bfloat16, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=128, tie_word_embeddings=True,
    )  # fmt: skip
