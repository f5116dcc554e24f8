"""Files that sources read: downloads, checks of folders, lines of text and cells of CSV."""

from hetero_fl.data.sources.files.local_files import (
    EMBEDDED,
    check_folder,
    contains_file,
    read_lines,
    split_cells,
    visible_files,
)

__all__ = [
    "EMBEDDED",
    "check_folder",
    "contains_file",
    "read_lines",
    "split_cells",
    "visible_files",
]
