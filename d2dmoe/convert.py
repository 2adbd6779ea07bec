"""The public path of `convert_model`; the pipeline is in `pipeline/`."""

from .pipeline.convert import convert, convert_model

__all__ = ["convert", "convert_model"]
