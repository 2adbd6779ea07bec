"""Text, token ids and images from the Hub, local files or CPython itself, as batches of tensors. Knows no model."""

from .batches import Batches, make_batches
from .documents import read_documents
from .table import Document

__all__ = ["Batches", "Document", "make_batches", "read_documents"]
