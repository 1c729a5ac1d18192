"""The verb ``export``: a trained model as a file or folder that leaves this package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, with_option_groups
from robusthash.apps.commands.terminal import note, progress_bars, reply


@dataclass(frozen=True)
class ModelPart:
    """Options of the part of a model that a file holds."""

    modality: Annotated[Literal["image", "text"], Option(help="What a file encodes.")] = "image"
    side: Annotated[
        Literal["query", "database"], Option(help="Of a model that purifies queries alone: which hasher.")
    ] = "query"
    pixels: Annotated[
        Literal["float32", "uint8"], Option(help="Images in [0, 1], or 0 to 255; an audit needs float32.")
    ] = "float32"


@dataclass(frozen=True)
class Upload:
    """Options of a model on the hub."""

    licence: Annotated[str, Option(help="Of the model card: apache-2.0, ...")] = "unknown"
    push: Annotated[str | None, Option(help="Upload the folder to USER/NAME of the Hugging Face hub.")] = None
    private: Annotated[bool, Option("--private/--public", help="Who sees what is pushed.")] = True


@with_option_groups
def export(
    model: Annotated[str, Argument(help="Run, folder of a saved model, or registry entry.")],
    to: Annotated[
        Literal["onnx", "torchscript", "torch"],
        Option(help="onnx and torchscript run without this package; torch is a folder for the hub."),
    ] = "onnx",
    out: Annotated[Path | None, Option(help="File, or folder of torch; by default NAME here.")] = None,
    part: ModelPart = ModelPart(),
    upload: Upload = Upload(),
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take a trained model away: ONNX, TorchScript, or a folder with weights and a model card.

    Purifier and normalisation are inside; codes come out packed, with their logits. The codes of 256 images
    are compared with those of the model, and the numbers are printed and stored in the file.
    """
    from robusthash.apps.experiment.export_run import export as export_model

    with progress_bars() as progress:
        result = export_model(
            model, out, progress=progress, to=to, overwrite=overwrite, **vars(part), **vars(upload)
        )
    check = result["check"]
    if not as_json:
        what = "texts" if to != "torch" and part.modality == "text" else "images"
        note(
            f"{check['equal_codes']} of {check['images']} {what} have the same code; "
            f"{check['equal_bits']} of {check['bits']} bits are equal"
        )
    lines = [result["path"], *([result["address"]] if "address" in result else [])]
    reply(as_json, result, lines)
