"""Recorded drives in the layouts of Udacity: logs in CSV, and an image file for each frame."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from hetero_fl.config.data import DrivingConfig
from hetero_fl.data.sources.files import contains_file, read_lines, split_cells
from hetero_fl.data.sources.image_files import image_pixels, open_image
from hetero_fl.utils.errors import UserError, one_line, suggest_similar
from hetero_fl.utils.serialization import check_name
from hetero_fl.utils.text import format_list

EXPORT = "interpolated.csv"
"""Log of a recorded drive, exported from the data of the Udacity challenge 2."""
SIMULATOR = "driving_log.csv"
"""Log of a drive in the Udacity simulator."""
LOGS = (EXPORT, SIMULATOR)
SIMULATOR_COLUMNS = ("center", "left", "right", "steering", "throttle", "brake", "speed")
"""Columns of the simulator's log, which may have no header."""
SIMULATOR_TIME = re.compile("[0-9]{4}(_[0-9]{2}){5}_[0-9]{3}")
"""Time in the name of an image of the simulator, from the year to the milliseconds."""
CENTER = "center_camera"
WHEEL_LIMIT = 4 * math.pi
"""Angle of a steering wheel in radians that no vehicle exceeds: two turns to a side."""
SPEED_LIMIT = 300.0
"""Speed in m/s or miles per hour that no vehicle exceeds."""
MILE_PER_HOUR = 0.44704
"""Meters per second."""
MIN_FRAMES = 10
"""Minimum number of frames of a drive."""


@dataclass(frozen=True)
class RecordedFrame:
    """A frame of a recorded drive.

    Attributes:
        name: Image file, relative to the folder of the drive.
        where: Line of the log, for error messages.
        angle: Angle of the front wheels in degrees, positive to the left.
        state: Speed in m/s, latitude and longitude in degrees. NaN if not recorded.
    """

    name: str
    where: str
    angle: float
    state: tuple[float, float, float]


def read_drive(folder: Path, settings: DrivingConfig) -> list[RecordedFrame]:
    """Read the log of a drive, without its images.

    `interpolated.csv` has the columns `frame_id`, `filename`, `angle` (of the steering wheel, in
    radians, positive to the left) and `speed` (m/s), and optionally `timestamp`, `lat` and `long`.
    Only the frames of `center_camera` are used. `driving_log.csv` has the columns of the Udacity
    simulator, with or without a header. Its angle `steering` is a share of
    `settings.max_angle`, positive to the right, and its `speed` is in miles per hour. Its images
    are in the folder `IMG`, whatever folder the log names.

    Args:
        folder: Folder with one of the logs.
        settings: Driving settings.

    Returns:
        Every `settings.step`-th frame, in the order of time.

    Raises:
        UserError: If the log is missing or malformed, the frames are out of order, or an image file
            does not exist or occurs twice.
    """
    found = [name for name in LOGS if (folder / name).is_file()]
    if len(found) != 1:
        entries = [e.name for e in folder.iterdir() if not e.name.startswith(".")]
        got = "both" if found else format_list(sorted(entries)) or "an empty folder"
        raise UserError(f"path: {folder}: expected {EXPORT} or {SIMULATOR}, got {got}")
    log = folder / found[0]
    read = _read_export if found[0] == EXPORT else _read_simulator
    frames = read(log, settings)
    _check_distinct(frames)
    frames = frames[:: settings.step]
    if len(frames) < MIN_FRAMES:
        step = f" with driving.step={settings.step}" if settings.step > 1 else ""
        raise UserError(
            f"path: {log}: expected at least {MIN_FRAMES} frames, got {len(frames)}{step}"
        )
    for frame in frames:
        if not contains_file(folder, frame.name):
            raise UserError(f"{frame.where}: image '{one_line(frame.name, 80)}' not found")
    return frames


def read_frames(files: Sequence[Path], settings: DrivingConfig) -> np.ndarray:
    """Read image files, cut them and resize them.

    Args:
        files: Image files, all of one size.
        settings: Driving settings, of which `crop`, `height` and `width` are used.

    Returns:
        Frames, uint8 `[N, 3, height, width]`. The channels of a gray image are equal.

    Raises:
        UserError: If a file is not an image, or the images have different sizes.
    """
    from PIL import Image

    frames = np.empty((len(files), 3, settings.height, settings.width), np.uint8)
    first: tuple[int, ...] = ()
    for index, file in enumerate(files):
        with open_image(file) as opened:
            pixels = image_pixels(opened, None)
        if pixels.dtype != np.uint8:
            raise UserError(f"path: {file}: expected 8 bits per pixel, got 16")
        height, width = pixels.shape[:2]
        first = first or (width, height)
        if (width, height) != first:
            raise UserError(
                f"path: {file}: expected {first[0]}x{first[1]} pixels as in {files[0].name}, got "
                f"{width}x{height}"
            )
        top, bottom = (round(share * height) for share in settings.crop)
        cut = Image.fromarray(pixels[top : max(top + 1, height - bottom)])
        small = cut.resize((settings.width, settings.height), Image.Resampling.BILINEAR)
        frames[index] = np.asarray(small.convert("RGB")).transpose(2, 0, 1)
    return frames


def _read_export(log: Path, settings: DrivingConfig) -> list[RecordedFrame]:
    """Return the frames of the center camera in `interpolated.csv`."""
    frames = []
    cameras: set[str] = set()
    last = -math.inf
    for where, row in _read_rows(log, ("frame_id", "filename", "angle", "speed")):
        cameras.add(row["frame_id"])
        if row["frame_id"] != CENTER:
            continue
        time = _number(row, "timestamp", where, optional=True)
        if time <= last:
            raise _out_of_order(where, "timestamp", row["timestamp"])
        last = last if math.isnan(time) else time
        wheel = _number(row, "angle", where)
        if abs(wheel) > WHEEL_LIMIT:
            raise UserError(
                f"{where}, column 'angle': expected radians from -{WHEEL_LIMIT:.1f} to "
                f"{WHEEL_LIMIT:.1f}, got {wheel:g}"
            )
        angle = math.degrees(wheel) / settings.steering_ratio
        position = _degrees(row, "lat", 90.0, where), _degrees(row, "long", 180.0, where)
        if position == (0.0, 0.0):
            # Exporters fill in zeros before the first position is known.
            position = math.nan, math.nan
        state = (_speed(row, where), *position)
        frames.append(RecordedFrame(_image(row, where), where, angle, state))
    if not frames:
        raise UserError(
            f"path: {log}: expected frames of {CENTER} in column 'frame_id', got "
            f"{format_list(sorted(cameras)) or 'no rows'}"
        )
    return frames


def _read_simulator(log: Path, settings: DrivingConfig) -> list[RecordedFrame]:
    """Return the frames of the center camera in `driving_log.csv`."""
    frames = []
    last = ""
    for where, row in _read_rows(log, SIMULATOR_COLUMNS, SIMULATOR_COLUMNS):
        steering = _number(row, "steering", where)
        if abs(steering) > 1:
            raise UserError(f"{where}, column 'steering': expected -1 to 1, got {steering:g}")
        # The log contains the paths of the machine that recorded it, which may be Windows.
        name = PureWindowsPath(row["center"]).name
        if time := SIMULATOR_TIME.search(name):
            if time[0] <= last:
                raise _out_of_order(where, "center", name)
            last = time[0]
        state = (MILE_PER_HOUR * _speed(row, where), math.nan, math.nan)
        frames.append(RecordedFrame(f"IMG/{name}", where, -settings.max_angle * steering, state))
    return frames


def _out_of_order(where: str, column: str, found: str) -> UserError:
    return UserError(
        f"{where}, column '{column}': must be later than in the frame before, got "
        f"'{one_line(found, 80)}'; sort the rows by time and give each drive its own folder"
    )


def _check_distinct(frames: Sequence[RecordedFrame]) -> None:
    """Check that no image occurs twice, which could be in training and test."""
    names = set()
    for frame in frames:
        if frame.name in names:
            raise UserError(
                f"{frame.where}: image '{one_line(frame.name, 80)}' occurs twice; remove the line"
            )
        names.add(frame.name)


def _read_rows(
    log: Path, needed: Sequence[str], default: Sequence[str] = ()
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the place of each row for error messages, and its cells keyed by column.

    Args:
        log: CSV file.
        needed: Columns that must exist.
        default: Columns of a file whose first line contains numbers and is therefore no header. If
            empty, the first line must be a header.

    Raises:
        UserError: If the file is empty or malformed, or a column is missing.
    """
    lines = read_lines(log)
    if not lines:
        raise UserError(f"path: {log}: the file is empty")
    header = split_cells(lines[0][1], f"path: {log}: line {lines[0][0]}")
    if default and any(map(_is_number, header)):
        header = list(default)
    else:
        lines = lines[1:]
    for name in needed:
        if (count := header.count(name)) > 1:
            raise UserError(f"path: {log}: header: column '{name}' occurs {count} times")
        if not count:
            listed = one_line(format_list(header), 200)
            hint = suggest_similar(name, header) or f"; the columns are {listed}"
            raise UserError(f"path: {log}: header: column '{name}' not found{hint}")
    for number, line in lines:
        where = f"path: {log}: line {number}"
        cells = split_cells(line, where)
        if len(cells) != len(header):
            raise UserError(f"{where}: expected {len(header)} cells, got {len(cells)}")
        yield where, dict(zip(header, cells, strict=True))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(row: Mapping[str, str], column: str, where: str, optional: bool = False) -> float:
    """Return the number in a cell. If `optional` is set, an absent or empty cell is NaN."""
    text = row.get(column, "")
    if optional and not text:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        shown = one_line(text, 80)
        raise UserError(f"{where}, column '{column}': expected a number, got '{shown}'")
    return number


def _speed(row: Mapping[str, str], where: str) -> float:
    speed = _number(row, "speed", where)
    if not 0 <= speed <= SPEED_LIMIT:
        raise UserError(f"{where}, column 'speed': expected 0 to {SPEED_LIMIT:g}, got {speed:g}")
    return speed


def _degrees(row: Mapping[str, str], column: str, limit: float, where: str) -> float:
    """Return a latitude or longitude, NaN if not recorded."""
    value = _number(row, column, where, optional=True)
    if abs(value) > limit:
        raise UserError(
            f"{where}, column '{column}': expected degrees from -{limit:g} to {limit:g}, got "
            f"{value:g}"
        )
    return value


def _image(row: Mapping[str, str], where: str) -> str:
    """Return the name of the image of a row, which must be in the folder of the drive."""
    check_name(row["filename"], f"{where}, column 'filename'")
    return str(PurePosixPath(row["filename"]))
