"""A point on a line that should go to a place which it cannot see: six places, six tasks."""

import gymnasium as gym
import numpy as np

from promptnb.tasks.wrapped import own


class Mass(gym.Env):
    "Observes position and speed; the action pushes. Reward: minus the distance to the place."

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, place=0.0):
        self.place = place

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.array([self.np_random.normal(0, 0.05), 0.0])
        return np.float32(self.state), {}

    def step(self, action):
        position, speed = self.state
        speed = 0.8 * speed + 0.1 * float(np.clip(action[0], -1, 1))
        self.state = np.array([position + speed, speed])
        return np.float32(self.state), -abs(self.state[0] - self.place), False, False, {}


gym.register("Mass-v0", f"{__name__}:Mass", max_episode_steps=30)


def controller(observations, goals, quality, rng):
    """Who plays the data: observations (N, 2) and the goals of N rows -> actions (N, 1) in [-1, 1].

    quality: one of those below, but "random", which is uniform without you."""
    place = np.array([goal["place"] for goal in goals])
    push = 3 * (place - observations[:, 0]) - 6 * observations[:, 1]
    return np.clip(push + 0.2 * rng.standard_normal(len(goals)), -1, 1)[:, None]


FAMILY = own(
    "mass",
    "Mass-v0",
    goals=[dict(place=place) for place in (-1.5, -0.9, -0.3, 0.3, 0.9, 1.5)],
    train=(0, 2, 3, 5),
    test=(1, 4),
    target_return=-4.0,  # what the return-to-go begins with
    rtg_scale=10.0,
    behaviour=controller,
    qualities=("expert", "random"),
    episodes=(4, 20, 100),  # of a task, at smoke, laptop and paper scale
)
