"""Tiny, randomly initialised models of many architectures, built in memory from their configs (no network).

Sizes: hidden 16 or 32, intermediate 48 or 64 (swin's second stage is twice as wide: 128), 2 layers, 99 tokens, 16 px.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Case:
    """One tiny model, and what the conversion has to find in it."""

    name: str
    build: Callable[[], PreTrainedModel]  # imports and constructs; the caller seeds torch
    blocks: int  # FFN or GLU blocks to find and convert, each counted once
    kind: str  # "ffn" or "glu"
    activation: str  # ACT2FN name of what the block computes
    fused: bool = False  # gate and up in one Linear
    shared: bool = False  # the same block runs more than once per forward


def _build(class_name: str, config: dict[str, Any]) -> PreTrainedModel:
    import transformers

    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**config)).eval()


def _case(
    name: str,
    class_name: str,
    *configs: dict[str, Any],
    act: str,
    blocks: int = 2,
    kind: str = "ffn",
    fused: bool = False,
    shared: bool = False,
    **extra: Any,
) -> Case:
    """Make a case of `class_name`; the config is the union of `configs` and `extra`, the later winning."""
    config: dict[str, Any] = {}
    for part in (*configs, extra):
        config |= part
    return Case(name, partial(_build, class_name, config), blocks, kind, act, fused, shared)


_glu = partial(_case, kind="glu")

# Size fields, in each family's own spelling. A config silently keeps a field it does not know, so spelling matters.
_TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = _TOKENS | _LAYERS | {"max_position_embeddings": 64}
_TEXT_NO_FFN = {key: value for key, value in _TEXT.items() if key != "intermediate_size"}
_GQA = _TEXT | {"num_key_value_heads": 2}  # most Llama-likes: the head size is hidden / heads
_GQA_HEAD = _GQA | {"head_dim": 8}  # Llama-likes whose config sets the head size by itself
_GPT = _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT_INNER = _GPT | {"n_inner": 64}
_IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
_VISION = _LAYERS | _IMAGE
_DINO = _IMAGE | {"num_hidden_layers": 2, "num_attention_heads": 4}  # the width comes from mlp_ratio
_T5 = _TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0}
_SEQ2SEQ = _TOKENS | {"d_model": 32, "decoder_start_token_id": 2}
_SEQ2SEQ |= {"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 4}
_SEQ2SEQ |= {"decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
_BART = _SEQ2SEQ | {"max_position_embeddings": 64}

_GQA_MHA = _TEXT | {"num_key_value_heads": 4}
_EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_EXPERTS |= {"n_group": 1, "topk_group": 1}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

CASES: tuple[Case, ...] = (
    # GPT-2 and its relatives; gpt2, openai-gpt and imagegpt use Conv1D
    _case("gpt2", "GPT2LMHeadModel", _GPT_INNER, act="gelu_new"),
    _case("openai-gpt", "OpenAIGPTLMHeadModel", _GPT, n_embd=16, act="gelu_new"),  # afn "gelu" means gelu_new here
    _case("imagegpt", "ImageGPTForCausalImageModeling", _GPT_INNER, act="quick_gelu"),
    _case("gptj", "GPTJForCausalLM", _GPT_INNER, rotary_dim=4, act="gelu_new"),
    _case("codegen", "CodeGenForCausalLM", _GPT_INNER, n_ctx=64, rotary_dim=4, act="gelu_new"),
    _case("ctrl", "CTRLLMHeadModel", _GPT, dff=64, act="relu"),
    _case(
        "gpt_neo",
        "GPTNeoForCausalLM",
        _TOKENS | {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4},
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        act="gelu_new",
    ),
    _case("gpt_neox", "GPTNeoXForCausalLM", _TEXT, act="gelu"),
    # Other decoders with a plain FFN
    _case("opt", "OPTForCausalLM", _TEXT_NO_FFN, ffn_dim=64, word_embed_proj_dim=32, act="relu"),
    _case("bloom", "BloomForCausalLM", _TOKENS, hidden_size=16, n_layer=2, n_head=2, act="gelu_new"),  # width: 4 hidden
    _case("falcon", "FalconForCausalLM", _TEXT_NO_FFN, ffn_hidden_size=64, act="gelu"),
    _case("mpt", "MptForCausalLM", _TOKENS, d_model=16, n_layers=2, n_heads=2, max_seq_len=64, act="gelu"),
    _case("phi", "PhiForCausalLM", _GQA, act="gelu_new"),
    _case("starcoder2", "Starcoder2ForCausalLM", _GQA, act="gelu_pytorch_tanh"),
    _case("nemotron", "NemotronForCausalLM", _GQA_HEAD, act="relu2"),
    _case("persimmon", "PersimmonForCausalLM", _TEXT, act="relu2"),
    _case("biogpt", "BioGptForCausalLM", _TEXT, act="gelu"),
    _case(
        "xglm",
        "XGLMForCausalLM",
        _TOKENS | {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
        max_position_embeddings=64,
        act="gelu",
    ),
    # Decoders with a GLU
    _glu("llama", "LlamaForCausalLM", _GQA_HEAD, act="silu"),
    _glu("mistral", "MistralForCausalLM", _GQA_HEAD, act="silu"),
    _glu("qwen2", "Qwen2ForCausalLM", _GQA, act="silu"),
    _glu("qwen3", "Qwen3ForCausalLM", _GQA_HEAD, act="silu"),
    _glu("gemma", "GemmaForCausalLM", _GQA_HEAD, act="gelu_pytorch_tanh"),
    _glu("gemma2", "Gemma2ForCausalLM", _GQA_HEAD, query_pre_attn_scalar=8, act="gelu_pytorch_tanh"),
    _glu("gemma3", "Gemma3ForCausalLM", _GQA_HEAD, query_pre_attn_scalar=8, act="gelu_pytorch_tanh"),
    _glu("phi3", "Phi3ForCausalLM", _GQA, original_max_position_embeddings=64, fused=True, act="silu"),
    _glu("glm", "GlmForCausalLM", _GQA_HEAD, fused=True, act="silu"),
    _glu("olmo2", "Olmo2ForCausalLM", _GQA, act="silu"),
    _glu("stablelm", "StableLmForCausalLM", _GQA, act="silu"),
    _glu("granite", "GraniteForCausalLM", _GQA, intermediate_size=48, mlp_bias=True, act="silu"),
    _glu("cohere", "CohereForCausalLM", _GQA, act="silu"),
    _glu("smollm3", "SmolLM3ForCausalLM", _GQA, act="silu"),
    # BERT and its relatives
    _case("bert", "BertForMaskedLM", _TEXT, act="gelu"),
    _case("bert-classifier", "BertForSequenceClassification", _TEXT, intermediate_size=48, num_labels=3, act="gelu"),
    _case("roberta", "RobertaForMaskedLM", _TEXT, act="gelu"),
    _case("electra", "ElectraForMaskedLM", _TEXT, embedding_size=16, act="gelu"),
    _case("albert", "AlbertForMaskedLM", _TEXT, embedding_size=16, blocks=1, shared=True, act="gelu_new"),
    _case("megatron-bert", "MegatronBertForMaskedLM", _TEXT, act="gelu"),
    _case("mpnet", "MPNetForMaskedLM", _TEXT, act="gelu"),
    _case("roformer", "RoFormerForMaskedLM", _TEXT, embedding_size=32, act="gelu"),
    _case(
        "nystromformer",
        "NystromformerForMaskedLM",
        _TEXT,
        segment_means_seq_len=8,
        num_landmarks=8,  # equal to the above: plain softmax attention at any length
        conv_kernel_size=3,
        act="gelu_new",
    ),
    _case(
        "distilbert",
        "DistilBertForMaskedLM",
        _TOKENS | {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        max_position_embeddings=64,
        act="gelu",
    ),
    _case(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        _TEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        act="gelu",
    ),
    _case(
        "mobilebert",  # every layer has one more block (num_feedforward_networks - 1), at the bottleneck's width
        "MobileBertForMaskedLM",
        _TEXT,
        embedding_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
        initializer_range=0.1,  # at 0.02 the blocks hardly change the output
        blocks=4,
        act="relu",
    ),
    _glu(
        "modernbert",
        "ModernBertForMaskedLM",
        _TEXT,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=8,
        initializer_range=0.1,  # at 0.02 the blocks hardly change the output
        fused=True,
        act="gelu",
    ),
    # Dense and shared blocks beside trained experts, which are left alone
    _glu("deepseek_v3", "DeepseekV3ForCausalLM", _GQA_MHA, _EXPERTS, _MLA, blocks=1, act="silu"),
    _glu("glm4_moe", "Glm4MoeForCausalLM", _GQA_HEAD, _EXPERTS, blocks=1, act="silu"),
    _glu(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _GQA,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        act="silu",
    ),
    _glu(
        "llama4",  # its router is a linear map that returns a tuple
        "Llama4ForCausalLM",
        _GQA_HEAD,
        intermediate_size_mlp=64,
        num_local_experts=4,
        moe_layers=[1],
        blocks=1,
        act="silu",
    ),
    # Vision (blip's own initializer_range is 1e-10: its blocks would compute nothing)
    _case("vit", "ViTForImageClassification", _VISION, act="gelu"),
    _case("deit", "DeiTForImageClassification", _VISION, act="gelu"),
    _case("beit", "BeitForImageClassification", _VISION, use_relative_position_bias=True, act="gelu"),
    _case("blip-vision", "BlipVisionModel", _LAYERS, image_size=16, patch_size=4, initializer_range=0.02, act="gelu"),
    _case("dinov2", "Dinov2ForImageClassification", _DINO, hidden_size=16, mlp_ratio=4, act="gelu"),
    _glu(
        "dinov2-swiglu",
        "Dinov2ForImageClassification",
        _DINO,
        hidden_size=32,
        mlp_ratio=3,  # two thirds of it: 64
        use_swiglu_ffn=True,
        act="silu",
    ),
    _case(
        "swin",  # stages of width 16 and 32
        "SwinForImageClassification",
        _IMAGE,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=2,
        blocks=4,
        act="gelu",
    ),
    # Text and image towers; siglip's pooling head holds one more MLP, which is not to be converted
    _case(
        "clip",
        "CLIPModel",
        {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 16},
        blocks=4,
        act="quick_gelu",
    ),
    _case(
        "siglip",
        "SiglipModel",
        {"text_config": _TEXT, "vision_config": _VISION},
        blocks=4,
        act="gelu_pytorch_tanh",
    ),
    _case("dinov3", "DINOv3ViTModel", _LAYERS, image_size=32, patch_size=16, act="gelu"),
    _case("trocr", "TrOCRForCausalLM", _SEQ2SEQ, max_position_embeddings=64, act="gelu"),
    # Encoder and decoder
    _case("t5", "T5ForConditionalGeneration", _T5, feed_forward_proj="relu", blocks=4, act="relu"),
    _glu("t5-gated", "T5ForConditionalGeneration", _T5, feed_forward_proj="gated-gelu", blocks=4, act="gelu_new"),
    _case("bart", "BartForConditionalGeneration", _BART, forced_eos_token_id=2, blocks=4, act="gelu"),
    _case("m2m_100", "M2M100ForConditionalGeneration", _BART, blocks=4, act="relu"),
    # Audio
    _case(
        "whisper",  # takes exactly 2 * max_source_positions frames
        "WhisperForConditionalGeneration",
        _SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=64,
        begin_suppress_tokens=None,
        blocks=4,
        act="gelu",
    ),
    _case(
        "wav2vec2",
        "Wav2Vec2ForCTC",
        _TOKENS | _LAYERS,
        conv_dim=[16, 16],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        act="gelu",
    ),
)


def tiny(name: str) -> PreTrainedModel:
    """Build the case `name` with seed 0, in eval mode."""
    import torch

    case = next((case for case in CASES if case.name == name), None)
    if case is None:
        raise KeyError(name)
    torch.manual_seed(0)
    return case.build().eval()


def check_generation(model: PreTrainedModel, beams: int, *, static: bool) -> None:
    """A batch padded on the left gives the same tokens with and without a cache, and with a static one."""
    import torch

    ids = torch.randint(5, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    ids[0, :2], mask = 0, torch.ones_like(ids)
    mask[0, :2] = 0
    run = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    tokens = [model.generate(ids, use_cache=cache, **run) for cache in (True, False)]
    assert torch.equal(*tokens)
    if static:
        assert torch.equal(model.generate(ids, cache_implementation="static", **run), tokens[0])


def converted_tiny(name: str) -> Any:
    """A tiny model with random routers, budgets at 0.25 and 0.5, and weights so large that skipped experts matter."""
    import torch
    from conftest import randomise_routers, randomise_vectors

    from d2dmoe.config import Budget, D2DMoEConfig
    from d2dmoe.discovery import discover
    from d2dmoe.moe.loader import attach

    model = tiny(name)
    for parameter in model.parameters():
        parameter.data *= 4
    randomise_vectors(model)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = 8
    budgets = [Budget(active, [1 - active] * len(blocks)) for active in (0.25, 0.5)]
    config = D2DMoEConfig(blocks=blocks, router_width=8, gate="topk", budgets=budgets)
    attach(model, config, [torch.arange(b.width) for b in blocks], budgets=0)
    randomise_routers(model)
    return model


def attached(model: Any) -> Any:
    """The model with experts that all run, and room for the bases of its projections and heads."""
    import torch
    from conftest import randomise_routers

    from d2dmoe.config import ConvertConfig, D2DMoEConfig
    from d2dmoe.config.sizes import choose_projections
    from d2dmoe.discovery import discover, find_projections
    from d2dmoe.moe.loader import attach

    blocks = discover(model).blocks
    for block in blocks:
        block.experts = 8
    found = choose_projections(ConvertConfig(attention="heads"), find_projections(model).found)
    config = D2DMoEConfig(blocks=blocks, router_width=8, projections=found)
    attach(model, config, [torch.arange(block.width) for block in blocks])
    randomise_routers(model)
    return model


def refit_randomly(model: Any) -> None:
    """Random refits of all output projections, for every budget of the record."""
    import torch

    from d2dmoe.stages.compensate import output_projections

    budgets = model.config.quantization_config.d2dmoe.budgets
    for layer in output_projections(model):
        states, p = [budget.projection_states[layer.number] for budget in budgets], layer.projection
        rows = max(p.rank, *(p.thin(state.method, state.ranks) for state in states))  # for any that a test may set
        for number in range(len(budgets)):
            layer.set_refit(states, number, torch.randn(rows, p.outputs) / 8, torch.randn(p.outputs))
