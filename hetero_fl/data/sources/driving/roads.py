"""Generated drives: roads with varying curvature, and the steering angle that follows them.

The vehicle is a bicycle model. It weaves in its lane, so that frames show offsets from the center
of the lane, and the angles that return to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPACING = 1.0
"""Distance between two points of a road in m."""
EASING = 24
"""Length in m over which the curvature of one section changes to that of the next (a clothoid)."""
LATERAL_ACCELERATION = 2.0
"""Acceleration in m/s² above which drivers slow down."""
BRAKING = 60
"""Length in m over which drivers change their speed."""
LOOK_AHEAD = 90
"""Length of road in m beyond the last frame of a drive, which that frame shows."""
WEAVES = ((0.16, 170.0), (0.12, 90.0), (0.05, 55.0))
"""Amplitude and wavelength in m of the offsets from the center of the lane."""


@dataclass(frozen=True)
class Road:
    """A road as points along its center line, which is the center of the vehicle's lane.

    Attributes:
        curvature: Curvature in 1/m, positive for left bends, float64 `[P]`.
        heading: Direction in radians, counterclockwise, float64 `[P]`.
        position: Position in m, east and north, float64 `[P, 2]`.
    """

    curvature: np.ndarray
    heading: np.ndarray
    position: np.ndarray

    @classmethod
    def from_curvature(cls, curvature: np.ndarray) -> Road:
        """Create a road that begins at the origin in the direction east.

        Args:
            curvature: Curvature at points with a distance of `SPACING`, float64 `[P]`.
        """
        # The midpoint rule, which is exact for the heading if the curvature changes linearly.
        heading = np.concatenate([[0.0], np.cumsum((curvature[1:] + curvature[:-1]) / 2 * SPACING)])
        middle = (heading[1:] + heading[:-1]) / 2
        steps = SPACING * np.stack([np.cos(middle), np.sin(middle)], 1)
        return cls(curvature, heading, np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)]))

    @property
    def length(self) -> float:
        """Length in m."""
        return SPACING * (len(self.curvature) - 1)

    def at(self, values: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Interpolate values `[P]` of the points at distances `[...]` from the beginning in m."""
        points = SPACING * np.arange(len(values))
        return np.interp(distance.ravel(), points, values).reshape(distance.shape)


@dataclass(frozen=True)
class RoadKind:
    """The bends of a kind of road.

    Attributes:
        bend: Mean curvature of a bend in 1/m.
        straight: Share of straight sections.
        left: Share of left bends.
        limit: Speed limit in m/s.
    """

    bend: float
    straight: float
    left: float
    limit: float


def make_road(rng: np.random.Generator, kind: RoadKind, length: float) -> Road:
    """Generate a road of straight sections and bends of 30 to 90 m.

    The curvature of a bend has a gamma distribution with shape 3, cut off at a radius of 20 m.

    Args:
        rng: Random generator.
        kind: Kind of road.
        length: Length in m.
    """
    points = int(length / SPACING) + 1
    sections = points // int(30 / SPACING) + 2
    lengths = rng.uniform(30, 90, sections) / SPACING
    size = np.minimum(kind.bend * rng.gamma(3.0, 1 / 3.0, sections), 1 / 20)
    sign = np.where(rng.random(sections) < kind.left, 1.0, -1.0)
    size[rng.random(sections) < kind.straight] = 0.0
    margin = int(EASING / SPACING)
    curvature = np.repeat(sign * size, lengths.astype(np.int64))[: points + margin - 1]
    # The mean over a window turns steps of the curvature into ramps.
    return Road.from_curvature(np.convolve(curvature, np.full(margin, 1 / margin), "valid"))


@dataclass(frozen=True)
class Vehicle:
    """The steering geometry of a vehicle.

    Attributes:
        wheelbase: Distance between the axles in m.
        understeer: Additional angle per lateral acceleration, in radians per m/s².
    """

    wheelbase: float = 2.7
    understeer: float = 0.002


def steering_angle(
    curvature: np.ndarray, speed: np.ndarray | float, vehicle: Vehicle
) -> np.ndarray:
    """Compute the angle of the front wheels that keeps a vehicle on a path.

    The angle is `atan(L * k) + K * k * v**2` for wheelbase L, curvature k, understeer K and speed
    v. The first term is that of the kinematic bicycle model, whose rear axle follows the path. The
    second is the understeer in steady cornering with lateral acceleration `k * v**2` (Rajamani,
    "Vehicle Dynamics and Control", 2012, sections 2.2 and 3.3).

    Args:
        curvature: Curvature of the path in 1/m, positive for left bends, shape `[N]`.
        speed: Speed in m/s, shape `[N]` or one number.
        vehicle: Steering geometry.

    Returns:
        Angles in degrees, positive to the left, shape `[N]`.

    Example:
        >>> import numpy as np
        >>> from hetero_fl.data.sources.driving.roads import Vehicle, steering_angle
        >>> steering_angle(np.array([0.0, 0.02]), 0.0, Vehicle(wheelbase=2.5)).round(3)
        array([0.   , 2.862])
    """
    lateral = curvature * np.square(speed)
    return np.degrees(np.arctan(vehicle.wheelbase * curvature) + vehicle.understeer * lateral)


@dataclass(frozen=True)
class Drive:
    """The frames of a drive, at equal intervals of time.

    Attributes:
        road: The road.
        distance: Distance along the road in m, float64 `[N]`.
        speed: Speed in m/s, float64 `[N]`.
        offset: Distance from the center of the lane to the left in m, float64 `[N]`.
        yaw: Direction relative to that of the road in radians, float64 `[N]`.
        curvature: Curvature of the path in 1/m, float64 `[N]`.
    """

    road: Road
    distance: np.ndarray
    speed: np.ndarray
    offset: np.ndarray
    yaw: np.ndarray
    curvature: np.ndarray

    def lane_ahead(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the center of the lane ahead in the coordinates of the vehicle.

        Args:
            length: Number of points, with a distance of 1 m along the road.

        Returns:
            Distances ahead, distances to the left (both in m), and directions relative to that of
            the vehicle in radians, float64 `[N, length]` each.
        """
        along = self.distance[:, None] + np.arange(length)
        heading = self.road.at(self.road.heading, along)
        east, north = (self.road.at(axis, along) for axis in self.road.position.T)
        # The position of the vehicle, to the left of the first point.
        east_vehicle = east[:, :1] - self.offset[:, None] * np.sin(heading[:, :1])
        north_vehicle = north[:, :1] + self.offset[:, None] * np.cos(heading[:, :1])
        direction = heading[:, :1] + self.yaw[:, None]
        east = east - east_vehicle
        north = north - north_vehicle
        ahead = east * np.cos(direction) + north * np.sin(direction)
        left = north * np.cos(direction) - east * np.sin(direction)
        return ahead, left, heading - direction

    def position(self) -> np.ndarray:
        """Return the positions of the vehicle in m, east and north, float64 `[N, 2]`."""
        heading = self.road.at(self.road.heading, self.distance)
        east, north = (self.road.at(axis, self.distance) for axis in self.road.position.T)
        shift = np.stack([-np.sin(heading), np.cos(heading)], 1) * self.offset[:, None]
        return np.stack([east, north], 1) + shift


def make_drive(
    rng: np.random.Generator, kind: RoadKind, frames: int, interval: float = 0.4
) -> Drive:
    """Generate a drive on a road of its own.

    The offset e from the center of the lane is a sum of sines of the distance s (`WEAVES`) with
    random phases. For a road with curvature k, the direction relative to the road is
    `atan(e' / (1 - k e))`, and the curvature of the path is `k / (1 - k e) + e''`, to first order
    in e'.

    Args:
        rng: Random generator.
        kind: Kind of road.
        frames: Number of frames.
        interval: Seconds between two frames.
    """
    length = frames * interval * kind.limit
    road = make_road(rng, kind, length + LOOK_AHEAD)
    bend = np.maximum(np.abs(road.curvature), 1e-6)
    allowed = np.minimum(kind.limit, np.sqrt(LATERAL_ACCELERATION / bend))
    window = int(BRAKING / SPACING)
    padded = np.pad(allowed, (window // 2, window - 1 - window // 2), mode="edge")
    speeds = np.convolve(padded, np.full(window, 1 / window), "valid")
    times = np.concatenate([[0.0], np.cumsum(SPACING / speeds[:-1])])
    distance = np.interp(interval * np.arange(frames), times, SPACING * np.arange(len(times)))
    offset, slope, second = weave(distance, rng.uniform(0, 2 * np.pi, len(WEAVES)))
    curvature = road.at(road.curvature, distance)
    across = 1 - curvature * offset
    return Drive(
        road,
        distance,
        road.at(speeds, distance),
        offset,
        np.arctan(slope / across),
        curvature / across + second,
    )


def weave(distance: np.ndarray, phases: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the offset from the center of the lane and its first and second derivative.

    Args:
        distance: Distance along the road in m, float64 `[N]`.
        phases: Phase of each sine of `WEAVES` in radians, float64 `[3]`.
    """
    amplitude, length = np.array(WEAVES).T
    frequency = 2 * np.pi / length
    angle = distance[:, None] * frequency + phases
    return (
        np.sin(angle) @ amplitude,
        np.cos(angle) @ (amplitude * frequency),
        np.sin(angle) @ (-amplitude * frequency**2),
    )
