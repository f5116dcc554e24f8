"""Rendered camera frames of a road: perspective, light, weather and the properties of a camera.

A frame is the view of a pinhole camera on a flat road (Hartley & Zisserman, "Multiple View Geometry
in Computer Vision", 2004, section 6.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetero_fl.data.sources.driving.roads import LOOK_AHEAD, Drive

LANE = 3.5
"""Width of a lane in m."""
LINE = 0.3
"""Width of a lane marking in m."""
DASH = 12.0
"""Length of a dash and the gap behind it in m."""
HORIZON = 75.0
"""Distance in m beyond which a frame shows no road."""
EXPOSURE = 0.4
"""Brightness to which cameras adjust their exposure, where 1 is the maximum of a pixel."""
MAX_GAIN = 2.5
"""Maximum factor by which cameras brighten a frame."""
GRAY = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in a gray camera (ITU-R BT.601)."""
WHITE = np.array([0.9, 0.9, 0.88], np.float32)
YELLOW = np.array([0.85, 0.7, 0.2], np.float32)
BATCH = 256
"""Number of frames rendered at a time. Does not affect the frames."""


@dataclass(frozen=True)
class Camera:
    """A camera and its position in the vehicle.

    Attributes:
        view: Horizontal angle of view in degrees.
        height: Height above the road in m.
        tilt: Angle below the horizontal in degrees.
        side: Distance from the middle of the vehicle to the left in m.
        color: Whether the camera records color.
        noise: Standard deviation of the noise of a pixel at a gain of 1.
        tint: Factors of red, green and blue.
    """

    view: float = 60.0
    height: float = 1.3
    tilt: float = 6.0
    side: float = 0.0
    color: bool = True
    noise: float = 0.01
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def ground(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the points of the road that the pixels of a frame show.

        A pixel at u to the right of and v below the center, in units of the focal length f, shows
        the point at `h (cos t - v sin t) / (sin t + v cos t)` ahead and
        `-h u / (sin t + v cos t)` to the left of the camera, for height h and tilt t.

        Args:
            height: Height of a frame in pixels.
            width: Width of a frame in pixels.

        Returns:
            Distance ahead of each row of pixels in m, float64 `[height]`, infinite above the
            horizon, and distance to the left of each pixel, `[height, width]`.
        """
        focal = width / 2 / np.tan(np.radians(self.view) / 2)
        right = (np.arange(width) + 0.5 - width / 2) / focal
        below = (np.arange(height) + 0.5 - height / 2) / focal
        tilt = np.radians(self.tilt)
        drop = np.sin(tilt) + below * np.cos(tilt)
        scale = np.divide(self.height, drop, out=np.full(height, np.inf), where=drop > 1e-9)
        ahead = np.where(np.isfinite(scale), scale * (np.cos(tilt) - below * np.sin(tilt)), np.inf)
        reach = np.where(ahead < HORIZON, scale, 0.0)
        return ahead, self.side - reach[:, None] * right


@dataclass(frozen=True)
class Scene:
    """The surroundings, the light and the weather of a drive.

    Attributes:
        ground: Color of the ground next to the road, red, green and blue.
        asphalt: Brightness of the road.
        contrast: Visibility of the lane markings from 0 to 1.
        lanes: Lanes to the left of that of the vehicle.
        yellow: Whether the line to the left of the vehicle is yellow.
        dashed: Whether the line to the left of the vehicle is dashed.
        night: Whether it is night, and the vehicle has its headlights on.
        lamps: Brightness of street lamps at night.
        shadows: Share of the road in shadows by day.
        visibility: Distance in m over which fog or rain reduces the contrast to 37%.
    """

    ground: tuple[float, float, float] = (0.3, 0.45, 0.2)
    asphalt: float = 0.35
    contrast: float = 1.0
    lanes: int = 1
    yellow: bool = False
    dashed: bool = True
    night: bool = False
    lamps: float = 0.0
    shadows: float = 0.0
    visibility: float = 400.0


def render(
    drive: Drive,
    camera: Camera,
    scene: Scene,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:
    """Render the frames of a drive.

    Args:
        drive: Positions of the vehicle on the road.
        camera: Camera and its position.
        scene: Surroundings, light and weather.
        size: Height and width of a frame in pixels.
        rng: Random generator of textures, shadows and noise.

    Returns:
        Frames, uint8 `[N, 3, height, width]`. The channels of a gray camera are equal.
    """
    height, width = size
    ahead, left = camera.ground(height, width)
    visible = ahead < HORIZON
    shade = _shadows(rng, int(drive.road.length) + 1, scene)
    frames = []
    for begin in range(0, len(drive.distance), BATCH):
        part = slice(begin, begin + BATCH)
        across, along = _road_coordinates(drive, part, ahead[visible], left[visible])
        road = _surface(across, along, left[visible], scene, rng)
        road *= _light(ahead[visible], left[visible], along, shade, scene)[..., None]
        air = 0.1 if scene.night else 0.75
        clear = np.exp(-ahead[visible] / scene.visibility)[:, None, None].astype(np.float32)
        light = np.empty((len(along), height, width, 3), np.float32)
        light[:, visible] = clear * road + (1 - clear) * air
        light[:, ~visible] = _sky(int((~visible).sum()), scene, rng)
        frames.append(_expose(light, camera, rng))
    return np.concatenate(frames).transpose(0, 3, 1, 2)


def _road_coordinates(
    drive: Drive, part: slice, ahead: np.ndarray, left: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates of the visible points on the road.

    Args:
        drive: Positions of the vehicle.
        part: Frames to use.
        ahead: Distance ahead of each row of pixels, `[R]`.
        left: Distance to the left of each pixel, `[R, W]`.

    Returns:
        Distance to the left of the center of the lane, float32 `[N, R, W]`, and distance along the
        road of each row, float64 `[N, R]`.
    """
    distance = drive.distance[part]
    chosen = Drive(
        drive.road, distance, drive.speed[part], drive.offset[part], drive.yaw[part], distance
    )
    center_ahead, center_left, direction = chosen.lane_ahead(LOOK_AHEAD)
    # A bend of more than a right angle is not visible behind the bend.
    center_ahead = np.maximum.accumulate(center_ahead, 1)
    after = (center_ahead[:, None, :] < ahead[:, None]).sum(2).clip(1, LOOK_AHEAD - 1)

    def pick(values: np.ndarray, index: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, index, 1)

    start = pick(center_ahead, after - 1)
    gap = np.maximum(pick(center_ahead, after) - start, 1e-6)
    weight = ((ahead - start) / gap).clip(0, 1)

    def interpolate(values: np.ndarray) -> np.ndarray:
        return (1 - weight) * pick(values, after - 1) + weight * pick(values, after)

    lateral = left - interpolate(center_left)[:, :, None]
    across = lateral * np.cos(interpolate(direction))[:, :, None]
    return across.astype(np.float32), distance[:, None] + after - 1 + weight


def _surface(
    across: np.ndarray,
    along: np.ndarray,
    left: np.ndarray,
    scene: Scene,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the colors of the road, its markings and the ground, `[N, R, W, 3]`."""
    # The width of a pixel on the road, over which the edges of markings are blurred.
    blur = np.abs(left[:, 1] - left[:, 0])[:, None].astype(np.float32)

    def stripe(center: float, width: float) -> np.ndarray:
        covered = (width / 2 + blur / 2 - np.abs(across - center)) / blur
        return np.asarray(covered.clip(0, np.minimum(1, width / blur)))

    right_edge = -LANE / 2
    left_edge = LANE / 2 + scene.lanes * LANE
    paved = stripe((right_edge + left_edge) / 2, left_edge - right_edge + 1.2)[..., None]
    texture = rng.normal(0, 0.03, across.shape).astype(np.float32)[..., None]
    color = paved * (scene.asphalt + texture) + (1 - paved) * (
        np.array(scene.ground, np.float32) + 2 * texture
    )
    is_dash = (along % DASH < DASH / 2)[:, :, None]
    for lane in range(scene.lanes + 2):
        line = scene.contrast * stripe(right_edge + lane * LANE, LINE)
        is_inner = 0 < lane < scene.lanes + 1
        if is_inner and scene.dashed:
            line = line * is_dash
        paint = YELLOW if is_inner and scene.yellow else WHITE
        color += line[..., None] * (paint - color)
    return color


def _shadows(rng: np.random.Generator, length: int, scene: Scene) -> np.ndarray:
    """Return the brightness along a road of this length in m, which is lower in shadows."""
    noise = np.convolve(rng.normal(size=length + 5), np.full(6, 6**-0.5), "valid")
    if scene.night or scene.shadows == 0:
        return np.ones(length)
    return np.where(noise < np.quantile(noise, scene.shadows), 0.5, 1.0)


def _light(
    ahead: np.ndarray, left: np.ndarray, along: np.ndarray, shade: np.ndarray, scene: Scene
) -> np.ndarray:
    """Return the brightness of the light on the road, float32 `[N, R, W]`."""
    if not scene.night:
        shaded = shade[along.astype(np.int64).clip(0, len(shade) - 1)]
        return np.broadcast_to(shaded[:, :, None], (*along.shape, left.shape[1])).astype(np.float32)
    beam = np.exp(-ahead / 25)[:, None] * np.exp(-np.square(left / (3 + 0.35 * ahead[:, None])))
    lamps = scene.lamps * np.square(np.cos(np.pi * along / 35))[:, :, None]
    return (0.03 + 0.9 * beam + lamps).astype(np.float32)


def _sky(rows: int, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return the colors of the rows above the horizon, `[rows, 1, 3]`."""
    if scene.night:
        return np.full((rows, 1, 3), 0.02, np.float32)
    clouds = rng.uniform(0.75, 0.95)
    blue = np.array([0.7, 0.85, 1.0], np.float32)
    fade = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    return clouds * (fade + (1 - fade) * blue)


def _expose(light: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Return the pixels that a camera records, uint8 `[N, H, W, 3]`."""
    n, height, width, _ = light.shape
    light = light * np.array(camera.tint, np.float32)
    if not camera.color:
        light = np.repeat((light @ GRAY)[..., None], 3, 3)
    gain = (EXPOSURE / np.maximum(light.mean((1, 2, 3), keepdims=True), 0.01)).clip(0.5, MAX_GAIN)
    noise = rng.normal(0, camera.noise, (n, height, width, 3 if camera.color else 1))
    recorded = gain * light + np.sqrt(gain) * noise.astype(np.float32)
    return np.rint(255 * recorded.clip(0, 1)).astype(np.uint8)
