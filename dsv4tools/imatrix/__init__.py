"""Importance matrices: how much each column of a matrix matters, measured on a text. Files, and who gets which vector.

Of a product ``x @ W.T`` those columns of W matter most whose inputs x are large: for each column the mean of x squared
weighs the errors that an encoder trades against each other.
"""

from dsv4tools.imatrix.assign import Coverage, Importance, assign_importance
from dsv4tools.imatrix.data import Imatrix, Sums
from dsv4tools.imatrix.file import ImatrixFile, open_imatrix
from dsv4tools.imatrix.provenance import FILE_KEY, HASH_KEY, provenance
from dsv4tools.imatrix.write import write_imatrix

__all__ = ["FILE_KEY", "HASH_KEY", "Coverage", "Imatrix", "ImatrixFile", "Importance", "Sums", "assign_importance",
           "open_imatrix", "provenance", "write_imatrix"]
