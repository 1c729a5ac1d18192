"""Text encoders: bags of words (B, V) in [0, 1], or token ids (B, L), -> (features (B, D), aux)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor, nn

from robusthash.core.limited_files import read_json
from robusthash.core.out_of_memory import out_of_memory
from robusthash.core.registry import register
from robusthash.core.runtime import packaged
from robusthash.models.hasher import Encoder
from robusthash.models.heads import dense


@register(
    "text-encoder", "mlp", paper="DCMH, CVPR 2017", evidence="paper+code", modality="text", state="measured"
)
class TextMLP(Encoder):
    """Fully connected layers with ReLU on a bag of words; the last width is D.

    Args:
        vocabulary: V, known from the data.
        widths: of the layers. Papers: DCMH (8192), DSARH (4096, 512), AGAH (8192, 4096, 512), DAPH (4096)
            with dropout 0.2, DADH (8192, 4096, 2048) with ``batchnorm``. Ours for small sets: (512,).
        dropout: after every layer.
        batchnorm: normalise before each ReLU.
    """

    def __init__(
        self, vocabulary: int, widths: Sequence[int] = (512,), dropout: float = 0.0, batchnorm: bool = False
    ) -> None:
        super().__init__()
        self.layers = dense(vocabulary, widths, dropout, batchnorm)
        self.vocabulary = vocabulary
        self.width = widths[-1]

    def forward(self, bags: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if bags.dim() != 2 or bags.shape[1] != self.vocabulary or not bags.is_floating_point():
            raise ValueError(
                f"this text encoder counts {self.vocabulary} words, and the texts come as {bags.dtype} "
                f"{tuple(bags.shape)}; use the vocabulary that it was trained with"
            )
        return self.layers(bags), {}


@register(
    "text-encoder", "transformer", paper="Devlin et al. 2019 (BERT)", evidence="library", modality="text"
)
class TextTransformer(Encoder):
    """A transformer of the BERT kind on token ids; features are its [CLS] state or the mean over the tokens.

    Padding is masked, so features do not depend on how far a text is padded. Frozen, it stays in eval mode.
    SFCL encodes texts by BERT-base. Needs the extra ``text``.

    Args:
        weights: folder with ``config.json`` and ``model.safetensors``. Local files only, no pickle, no
            foreign code. ``"minilm"`` is MiniLM-L6 (D = 384) of the extra ``weights``. None is a new model of
            ``config``, as when a trained run is opened again.
        trainable: train its weights too.
        pooling: ``cls``, the last state of the first token, or ``mean``, of all tokens that are no padding.
        config: the content of ``config.json``; of use without ``weights`` only.
    """

    def __init__(
        self,
        weights: str | None = None,
        trainable: bool = False,
        pooling: Literal["cls", "mean"] = "cls",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be 'cls' or 'mean', got {pooling!r}")
        if weights is not None:
            self.model = _pretrained(packaged(weights))
        elif config is not None:
            self.model = _untrained(config)
        else:
            raise ValueError("a transformer needs weights, the folder with config.json and model.safetensors")
        self.model.requires_grad_(trainable)
        self.model.eval()
        self.trainable = trainable
        self.pooling = pooling
        known = self.model.config
        self.padding = 0 if known.pad_token_id is None else int(known.pad_token_id)
        self.longest = int(known.max_position_embeddings)
        self.words = int(known.vocab_size)
        self.width = int(known.hidden_size)

    @property
    def resolved_options(self) -> Mapping[str, Any]:
        return {"config": json.loads(self.model.config.to_json_string())}

    @property
    def embedding(self) -> nn.Module:
        module: nn.Module = self.model.get_input_embeddings()
        return module

    def train(self, mode: bool = True) -> TextTransformer:
        """Set the mode, but frozen weights stay in eval mode: their dropout is never wanted."""
        super().train(mode)
        self.model.train(mode and self.trainable)
        return self

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self._check(ids)
        mask = (ids != self.padding).long()
        # the first token is [CLS] and always attended to: a text of padding alone would have no other
        mask[:, 0] = 1
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0], {}
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1), {}

    def _check(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(
                f"the text encoder 'transformer' takes (B, L) token ids, and the texts come as {ids.dtype} "
                f"{tuple(ids.shape)}; set texts: tokens and tokenizer: PATH for the data"
            )
        if ids.shape[1] > self.longest:
            raise ValueError(
                f"texts of {ids.shape[1]} tokens, and this encoder takes {self.longest} at most; "
                f"set max_length: {self.longest} for the data"
            )
        if (last := int(ids.max())) >= self.words:
            raise ValueError(f"token id {last}, not below {self.words}: use the tokenizer of the weights")


def _transformers() -> Any:
    try:
        import transformers  # seconds to import, and only this encoder needs it
    except ImportError as error:
        message = "the text encoder 'transformer' needs transformers: pip install robusthash[text]"
        raise ImportError(message) from error
    return transformers


def _untrained(config: Mapping[str, Any]) -> Any:
    auto = _transformers()
    if "model_type" not in config:
        raise ValueError(f"the config of a transformer needs model_type, got {sorted(config)}")
    return auto.AutoModel.from_config(auto.AutoConfig.for_model(**config))


def _pretrained(folder: Path) -> Any:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            path = (folder / name).absolute()
            raise FileNotFoundError(f"no file {path}; a transformer needs it, as BERT folders have it")
    read_json(folder / "config.json")  # within limits, which transformers has not
    auto = _transformers()
    logging = auto.utils.logging
    progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        model, loading = auto.AutoModel.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder} holds no transformer that can be read: {reason}") from error
    finally:
        if progress_bar:
            logging.enable_progress_bar()
    # what is missing, the library draws at random; the pooler is not used here, and some files lack it
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"{folder / 'model.safetensors'} lacks {len(missing)} tensors of the net in its config.json "
            f"(first: {missing[0]}); take both files from one place"
        )
    return model
