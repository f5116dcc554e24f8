"""Camera frames and steering angles of vehicles: folders of drives, and simulated drives."""

from hetero_fl.data.sources.driving.drive_files import read_frames
from hetero_fl.data.sources.driving.source import read_driving_folder

__all__ = ["read_driving_folder", "read_frames"]
