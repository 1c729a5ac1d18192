"""A pretrained transformer on token ids: (B, L) int64 -> (features (B, D), aux)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor, nn

from robusthash.core.registry import register


@register(
    "text-encoder", "transformer", paper="Devlin et al. 2019 (BERT)", evidence="library", modality="text"
)
class TextTransformer(nn.Module):
    """A transformer of the BERT kind, read from a folder; features are its [CLS] state or the mean over the
    tokens.

    SFCL encodes texts by BERT-base. Padding, the id ``pad_token_id`` of the model's configuration, is masked,
    so the features do not depend on how far a text is padded. Frozen, it stays in eval mode and makes no
    gradients, so that training a head costs one forward pass a batch; nothing is computed ahead. Attacks
    differentiate at ``embedding``.

    Args:
        weights: folder with ``config.json`` and ``model.safetensors``. Local files only, no pickle, no
            foreign code. None is a new model of ``config``, as when a trained run, which has all weights, is
            opened again.
        trainable: train its weights too.
        config: what ``config.json`` says; of use without ``weights`` only.
        pooling: ``cls``, the last state of the first token, or ``mean``, of all tokens that are no padding.

    Raises:
        ImportError: the extra ``text`` is not installed.
        FileNotFoundError: no such folder or file.
        ValueError: another pooling, neither weights nor config, or a folder that holds no such model.
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
        if weights is None and config is None:
            raise ValueError("a transformer needs weights, the folder with config.json and model.safetensors")
        self.model = _made(config) if weights is None and config is not None else _load(Path(str(weights)))
        self.model.requires_grad_(trainable)
        self.model.eval()
        self.trainable = trainable
        self.pooling = pooling
        known = self.model.config
        self.remembered = {"config": json.loads(known.to_json_string())}
        self.padding = 0 if known.pad_token_id is None else int(known.pad_token_id)
        self.longest = int(known.max_position_embeddings)
        self.words = int(known.vocab_size)
        self.width = int(known.hidden_size)

    @property
    def embedding(self) -> nn.Module:
        """The module that looks tokens up: (B, L) ids -> (B, L, D)."""
        found: nn.Module = self.model.get_input_embeddings()
        return found

    def train(self, mode: bool = True) -> TextTransformer:
        """Frozen weights stay in eval mode: their dropout is never wanted."""
        super().train(mode)
        self.model.train(mode and self.trainable)
        return self

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self._check(ids)
        mask = (ids != self.padding).long()
        # the first token is [CLS] and always seen: a text of padding alone would have nothing to attend to
        mask[:, 0] = 1
        # frozen weights and whole numbers record nothing for a backward pass, and an attack may ask at the
        # embeddings
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0], {}
        shown = mask[:, :, None].to(states.dtype)
        return (states * shown).sum(1) / shown.sum(1), {}

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
        if int(ids.max()) >= self.words:
            raise ValueError(
                f"token id {int(ids.max())} and this encoder knows {self.words}; use the tokenizer that it came with"
            )


def _transformers() -> Any:
    try:
        import transformers  # seconds to import, and only this encoder needs it
    except ImportError as error:
        raise ImportError(
            "the text encoder 'transformer' needs transformers: pip install robusthash[text]"
        ) from error
    return transformers


def _made(config: Mapping[str, Any]) -> Any:
    """A model of this architecture with new weights."""
    auto = _transformers()
    if "model_type" not in config:
        raise ValueError(f"the config of a transformer needs model_type, got {sorted(config)}")
    return auto.AutoModel.from_config(auto.AutoConfig.for_model(**config))


def _load(folder: Path) -> Any:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no file {(folder / name).absolute()}; a transformer needs it, as BERT folders have it"
            )
    auto = _transformers()
    chatter = auto.utils.logging
    shown = chatter.is_progress_bar_enabled()
    chatter.disable_progress_bar()
    try:
        return auto.AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no transformer that can be read: {error}") from error
    finally:
        if shown:
            chatter.enable_progress_bar()
