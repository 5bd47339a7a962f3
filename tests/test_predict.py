"""A policy step by step: stable-baselines3 plays it as its own models, and it earns what it earns in lock step."""

import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from promptnb import tasks
from promptnb.core import Steps
from promptnb.evaluate import episode_seeds, eval_tasks, rollout
from promptnb.models.dt import Policy
from promptnb.predict import Predictor

FAM, N, LIMIT = tasks.family("cheetah-vel"), 3, 30


class Seeded(gym.Wrapper):
    "An environment whose next episode begins with the seed that it was given."

    def __init__(self, env, seed):
        super().__init__(env)
        self.own = seed

    def reset(self, **kw):
        return self.env.reset(seed=self.own)


@pytest.fixture(scope="module")
def policy():
    "A small policy with a prompt for each test task; it reads returns to come, and acts by them."
    torch.manual_seed(0)
    model = dict(state_dim=20, act_dim=6, width=16, layers=1, heads=2, max_timestep=FAM.horizon)
    bare = Policy(model, K=4, rtg_scale=10.0)
    G, P = len(FAM.test), 5
    steps = Steps(
        torch.randn(G, P, 20),
        torch.randn(G, P, 6),
        torch.randn(G, P, 1),
        torch.arange(P).expand(G, P),
        torch.ones(G, P),
    )
    return bare.with_prompt(steps).eval()


def environment(task, seed):
    env = gym.make(FAM.env_id, task=task)
    return Seeded(gym.wrappers.TimeLimit(env.unwrapped, LIMIT), seed)


def played(predictor, task, seeds):
    "Returns (n,) of an episode in each of n environments, as stable-baselines3 counts them."
    envs = DummyVecEnv([lambda seed=seed: predictor.watch(environment(task, seed)) for seed in seeds])
    with warnings.catch_warnings(action="ignore"):  # it would like its own Monitor around the environment
        returns, lengths = evaluate_policy(predictor, envs, len(seeds), return_episode_rewards=True)
    assert lengths == [LIMIT] * len(seeds)
    return np.array(returns)


@pytest.mark.parametrize("row", [0, 2])
def test_stable_baselines3_evaluates_it(row, policy):
    "The same seeds, prompt and returns to come: the same returns, as rollout gives them."
    task = FAM.test[row]
    evals = eval_tasks(policy, [task], [row])
    there = rollout(evals, FAM, N, seed=5, limit=LIMIT).returns[0]
    here = played(Predictor(policy, FAM, FAM.task_name(task)), task, episode_seeds(evals, FAM, N, 5))
    assert np.allclose(here, there, rtol=1e-5), (here, there)
    other = played(Predictor(policy, FAM, 1), task, episode_seeds(evals, FAM, N, 5))
    assert not np.allclose(other, there, rtol=1e-3), "another prompt plays alike: the test could not fail"


def test_a_second_episode_begins_anew(policy):
    "Its memory of the first one is gone: the same seed twice gives the same return twice."
    predictor = Predictor(policy, FAM)
    env = predictor.watch(environment(FAM.test[0], 7))
    with warnings.catch_warnings(action="ignore"):
        returns, _ = evaluate_policy(predictor, env, 2, return_episode_rewards=True)
    assert returns[0] == returns[1]


def test_gymnasiums_vector_environments_ask_at_the_last_observation_too(policy):
    "Two episodes of full length in each: the answer there goes nowhere, and the second plays as the first."
    predictor = Predictor(policy, replace(FAM, horizon=LIMIT))
    envs = gym.vector.SyncVectorEnv([lambda s=s: predictor.watch(environment(FAM.test[0], s)) for s in (3, 4)])
    observations, _ = envs.reset()
    start, over, returns = np.ones(2, bool), np.zeros(2, bool), np.zeros((2, 2))
    for episode in returns:
        for _ in range(LIMIT + 1):  # the last one begins the next episode
            actions, _ = predictor.predict(observations, episode_start=start)
            observations, rewards, _, truncated, _ = envs.step(actions)
            start, over = over, truncated
            episode += rewards
    assert np.array_equal(returns[0], returns[1]) and returns.all()


def test_an_episode_of_full_length_ends(policy, refused):
    predictor = Predictor(policy, FAM)
    for _ in range(FAM.horizon + 1):
        predictor.predict(np.zeros(20), reward=0.0)
    refused(predictor.predict, np.zeros(20), reward=0.0, says=["has had its 200 steps", "episode_start=True"])


def test_steps_as_prompt(policy):
    "The steps of a prompt, given as they are, act as the prompt itself."
    task, seeds = FAM.test[2], [3]
    own = policy.prompt[2]
    assert np.allclose(played(Predictor(policy, FAM, own), task, seeds), played(Predictor(policy, FAM, 2), task, seeds))


def test_rewards_by_hand(policy):
    "Told of each reward, it acts as where the environment is watched."
    env = environment(FAM.test[0], 7)
    predictor, total, reward, over = Predictor(policy, FAM), 0.0, None, False
    observation, _ = env.reset()
    while not over:
        action, _ = predictor.predict(observation, reward=reward)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, over = total + reward, terminated or truncated
    watched = Predictor(policy, FAM)
    assert np.isclose(total, played(watched, FAM.test[0], [7])[0], rtol=1e-5)


def test_what_it_refuses(policy, refused):
    predictor = Predictor(policy, FAM)
    predictor.predict(np.zeros(20))
    refused(predictor.predict, np.zeros(20), says=["predictor.watch(env)", "reward="])
    refused(
        Predictor, policy, FAM, "cheetah-vel-00", says=["is no test task of cheetah-vel", FAM.task_name(FAM.test[0])]
    )
    refused(Predictor, policy, FAM, "cheetah-dir-00", says=["is no test task of cheetah-vel"])
    refused(Predictor, policy, FAM, "cheetah-vel-99", says=["cheetah-vel-99"])


def test_choices():
    "Actions of a family of choices are numbers, one at one observation and n at n."

    class First:
        K = 1

        def begin(self, rows):
            return torch.zeros(len(rows))

        def act(self, history, state):
            return torch.eye(fam.act_dim)[[1]].expand(len(state), -1)

    from promptnb.tasks.wrapped import own

    fam = own("cart-of-predict", "CartPole-v1", horizon=20)
    assert Predictor(First(), fam).predict(np.zeros(4))[0] == 1
    assert Predictor(First(), fam).predict(np.zeros((2, 4)))[0].tolist() == [1, 1]
