"""Files that sources read: downloads, checks of folders, lines of text and cells of CSV."""

from hetero_fl.data.sources.files.folders import check_folder, contains_file, visible_files
from hetero_fl.data.sources.files.text_lines import MARK, decode, read_lines, split_cells

__all__ = [
    "MARK",
    "check_folder",
    "contains_file",
    "decode",
    "read_lines",
    "split_cells",
    "visible_files",
]
