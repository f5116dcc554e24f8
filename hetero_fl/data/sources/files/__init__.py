"""Files that sources read: downloads, checks of folders, lines of text and cells of CSV."""

from hetero_fl.data.sources.files.local_files import (
    MARK,
    check_folder,
    contains_file,
    decode,
    read_lines,
    split_cells,
    visible_files,
)

__all__ = [
    "MARK",
    "check_folder",
    "contains_file",
    "decode",
    "read_lines",
    "split_cells",
    "visible_files",
]
