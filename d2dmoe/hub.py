"""Open a model by hub id or local folder: its class, config, weights and processor, with errors a user can act on."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
import transformers
from huggingface_hub import errors
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from . import vocabulary
from .config.options import DataConfig
from .config.record import D2DMoEConfig
from .errors import UserError, causes, first_line
from .files import identity
from .tensors import CHECKSUMS

Data = TypeVar("Data", bound=DataConfig)
SAFE = {"trust_remote_code": False}  # a model's own code is never run, and not asked for
ADAPTER = "adapter_config.json"
LOCAL_WAYS = (
    "local ways: a folder written by save_pretrained, the bundled checkpoints/gpt2-mini, an earlier download with "
    "HF_HUB_OFFLINE=1, or a mirror named in HF_ENDPOINT"
)


def read_config(name: str, revision: str | None = None) -> Any:
    """The model's config.

    Raises:
        UserError: If there is no such folder or hub model, or the hub cannot be reached.
    """
    if not name:
        raise UserError("no model given; use --model with a hub id or a local folder")
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / ADAPTER).is_file():
            raise UserError(
                f"--model {name}: is a peft adapter without its model; load both, call merge_and_unload, and give the "
                f"folder that save_pretrained writes"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name}: the folder has no config.json; it must be one written by save_pretrained")
    elif path.exists():
        raise UserError(f"--model {name}: a file; give the folder that save_pretrained wrote, or a hub id")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"--model {name}: no such folder; check the path, or give a hub id such as openai-community/gpt2"
        )
    if (path / ADAPTER).is_file():
        raise _beside_an_adapter(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, local_files_only=local_only(name), **SAFE)
    except UserError:
        raise
    except Exception as error:
        raise _explain(name, error) from None
    _pad_by_end(config)
    return config


def _beside_an_adapter(name: str) -> UserError:
    """What to do with an adapter that `transformers` would load, and save in the place of the model."""
    return UserError(
        f"--model {name}: a peft adapter lies beside the model ({ADAPTER}); merge it (merge_and_unload, then "
        f"save_pretrained to another folder), or move {ADAPTER} away to leave the adapter out"
    )


def _pad_by_end(config: Any) -> None:
    """Give a classifier of a decoder the padding token without which it takes one text at a time."""
    text = config.get_text_config()
    classifies = any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or [])
    if classifies and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = vocabulary.token_of(config, "eos") or 0  # batches are padded with it, so it is a real token


def refuse_quantised(name: str, config: Any) -> None:
    """Refuse a checkpoint that is not the original in floating point.

    Raises:
        UserError: Naming the method that it was quantised by.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None or is_converted(config):
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    method = getattr(method, "value", method)
    raise UserError(f"--model {name}: is quantised already ({method}); give the floating-point model it was made from")


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: Naming the first such tensor.
    """
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"--model {name}: {key} holds NaN or infinite values; give a model without them")


# Of a model's folder: weights in any format, what we write ourselves, and traces of its training.
LEFT_BEHIND = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.ot",
    "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.mlmodel", "*.tflite", "*.pkl", "onnx/*", "openvino/*",
    "coreml/*", ".*", "*/.*", "checkpoint-*/*", "runs/*", "config.json", "README.md", "recipe.yaml", "results.json",
    CHECKSUMS, "report.html", "report.json", "report/*.png", "bench*.json",
)  # fmt: skip


def companions(name: str, revision: str | None = None) -> dict[str, Path]:
    """The files of a model that its conversion does not replace, by their path in its folder.

    Pooling and normalisation of an embedding model, for instance, or a chat template. Its tokenizer's files are among
    them.
    """
    root = Path(name)
    if not root.is_dir():
        root = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, local_files_only=local_only(name), ignore_patterns=[*LEFT_BEHIND]
            )
        )
    files = {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}
    return {k: p for k, p in files.items() if not any(fnmatch(k, pattern) for pattern in LEFT_BEHIND)}


@functools.cache
def reachable() -> bool:
    """Whether the hub answers; asked once."""
    if huggingface_hub.is_offline_mode():
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:
        return False
    return True


def local_only(name: str) -> bool:
    """Whether a name is looked up on this machine alone: it is a path, or the hub does not answer.

    The hub's client would otherwise retry every file for half a minute. Earlier downloads are still found.
    """
    return Path(name).exists() or not reachable()


def _explain(name: str, error: Exception) -> UserError:
    """Which of the usual mishaps this is."""
    if Path(name).is_dir():
        return UserError(f"--model {name}: its config.json cannot be read ({first_line(error)})")
    if "trust_remote_code" in str(error):
        return UserError(f"--model {name}: it needs its own code, which d2dmoe does not run; give another model")
    for cause in causes(error):
        if isinstance(cause, errors.GatedRepoError):
            return UserError(
                f"--model {name}: the hub refuses access; ask for it there and log in with `hf auth login`"
            )
        if isinstance(cause, errors.RepositoryNotFoundError | errors.HFValidationError):
            return UserError(f"--model {name}: neither a local folder nor a model on the hub; check the spelling")
        if isinstance(cause, errors.RevisionNotFoundError):
            return UserError(f"--model {name}: the hub has no such --revision of it")
        if isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError):
            return UserError(f"--model {name}: not a local folder, and the hub cannot be reached; {LOCAL_WAYS}")
    return UserError(f"--model {name}: it cannot be opened ({first_line(error)}); give another model")


def is_converted(config: Any) -> bool:
    """Whether this config is of a checkpoint that `convert` wrote."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return method == "d2dmoe"


def conversion_record(config: Any) -> D2DMoEConfig | None:
    """The conversion's record in this config, `None` for a dense model.

    Raises:
        UserError: If a newer d2dmoe wrote it.
    """
    stored = getattr(config, "quantization_config", None)
    if not is_converted(config):
        return None
    return D2DMoEConfig.from_dict(stored) if isinstance(stored, dict) else stored.d2dmoe


def model_class(config: Any, name: str = "") -> type[PreTrainedModel]:
    """The class that the checkpoint was saved from, by the name in its config.

    Raises:
        UserError: If `transformers` has no such class.
    """
    for architecture in getattr(config, "architectures", None) or []:
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    raise UserError(
        f"--model {name}: its config names {getattr(config, 'architectures', None)}, and transformers "
        f"{transformers.__version__} has no such class"
    )


def fit_length(data: Data, config: Any) -> Data:
    """The data's settings, with sequences no longer than the config says. Some models take a few tokens less."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return replace(data, max_length=min(data.max_length, limit)) if limit > 0 else data


def is_causal(kind: type) -> bool:
    """Whether this class is a causal language model, by the naming rule of `transformers`: its text is packed."""
    return kind.__name__.endswith(("ForCausalLM", "LMHeadModel"))


def is_classifier(kind: type, config: Any) -> bool:
    """Whether this class gives each text or image one of several classes, by the naming rule of `transformers`."""
    found = any(re.search(r"For(?!Token)\w*Classification", base.__name__) for base in kind.__mro__)
    return found and config.num_labels > 1 and config.problem_type in (None, "single_label_classification")


def load_model(
    name: str, config: Any, revision: str | None = None, dtype: torch.dtype = torch.float32, *, changed: bool = False
) -> PreTrainedModel:
    """The model with its weights, in evaluation mode; `changed` if `config` is not the one that lies beside them.

    Raises:
        UserError: If the weights are missing, truncated or do not fit.
    """
    check_safetensors(name)
    other = {"config": copy.deepcopy(config)} if changed or not is_converted(config) else {}
    try:
        model, info = model_class(config, name).from_pretrained(
            name, revision=revision, local_files_only=local_only(name), dtype=dtype, output_loading_info=True,
            use_safetensors=True, **SAFE, **other,
        )  # fmt: skip
    except UserError:
        raise
    except OSError as error:
        if re.search("no file named|not appear to have a file named", str(error)):
            raise UserError(
                f"--model {name}: its weights cannot be read, because they are not in safetensors files and d2dmoe "
                f"unpickles nothing; open it with transformers and write it again with save_pretrained"
            ) from None
        if Path(name).is_dir():
            raise UserError(f"--model {name}: its weights cannot be read ({first_line(error)})") from None
        raise _explain(name, error) from None
    except SafetensorError as error:
        raise UserError(f"--model {name}: a safetensors file is damaged ({first_line(error)})") from None
    _pad_by_end(model.config)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _beside_an_adapter(name)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"--model {name}: the checkpoint lacks {len(missing)} tensors of the model, first {missing[0]}")
    return model.eval()


def load_dense(name: str, config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The dense twin of a converted folder: what a program opens that has never heard of d2dmoe.

    A folder with networks in the places of projections has none: then a model of its shapes with random weights, which
    takes the same time.
    """
    record = conversion_record(config)  # none where a program without d2dmoe saved the folder
    if record is not None and record.networks:
        return model_class(config, name)(without_record(config)).to(dtype).eval()
    return model_class(config, name).from_pretrained(name, config=without_record(config), dtype=dtype).eval()


def without_record(config: Any) -> Any:
    """A copy of the config as that of a dense model."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def check_safetensors(name: str) -> None:
    """Whether the headers of the weight files can be read and match their sizes: a copy that was cut off does not.

    Raises:
        UserError: Naming the file.
    """
    if not Path(name).is_dir():
        return
    for file in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            size = file.stat().st_size
            raise UserError(
                f"--model {name}: {file.name} is truncated or damaged ({size} bytes); copy it again"
            ) from None


def load_processor(name: str, config: Any, revision: str | None = None) -> Any:
    """The tokenizer, or the image processor of a vision model; `None` where there is none."""
    return _open_processor(name, config, revision)[0]


def _open_processor(name: str, config: Any, revision: str | None) -> tuple[Any, str]:
    """The tokenizer or image processor, and the reason if there is none."""
    vision = getattr(model_class(config, name), "main_input_name", "input_ids") == "pixel_values"
    kind = AutoImageProcessor if vision else AutoTokenizer
    processor, failure = None, None
    try:
        if vision or not vocabulary.lfs_pointer(name):
            processor = kind.from_pretrained(name, revision=revision, local_files_only=local_only(name), **SAFE)
    except Exception as error:
        failure = error
    if vision or (processor is not None and not vocabulary.is_invented(name, processor, revision)):
        return processor, "the model comes with no tokenizer"
    return None, vocabulary.why_absent(name, processor, failure, revision)


def token_facts(name: str, config: Any, revision: str | None = None) -> dict[str, Any]:
    """What `make_batches` needs to know of a model: its token ids, and the reason if it has no tokenizer."""
    return {
        "vocabulary": vocabulary.size_of(config), "pad_id": vocabulary.token_of(config, "pad"),
        "image_tokens": vocabulary.patches_of(config),
        "no_tokenizer": lambda: _open_processor(name, config, revision)[1],
    }  # fmt: skip


def fingerprint(name: str, config: Any) -> dict[str, Any]:
    """What tells whether a model is still the same one: the hub commit, or the identity of local files."""
    commit = getattr(config, "_commit_hash", None)
    if not Path(name).is_dir():
        return {"model": name, "commit": commit}
    files = [f for pattern in ("*.safetensors", "*.json") for f in sorted(Path(name).glob(pattern))]
    return {"model": str(Path(name).resolve()), **identity({f.name: f for f in files})}
