"""Reacher2d is LaMo's: each constant of its model file, a plain MuJoCo loop beside ours, a servo that earns the same.

Source: LaMo-2023 repository @3e4fcc8, experiment-d4rl/decision_transformer/envs: reacher_2d.py and, below assets,
reacher_2d.xml."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from promptnb import collect, data, experts, tasks
from promptnb.core import PromptnbError
from promptnb.tasks.locomotion import BODIES, REACHER, fingertip

FAMILY = tasks.family("reacher2d")
N, STEPS, SKIP = 12, 100, 15


@pytest.fixture(scope="module")
def model():
    return BODIES["reacher2d"].model()


def plain_model():
    "The model as LaMo's code has it: the target is a body without joints, which is moved."
    tree = ET.fromstring(REACHER)
    target = tree.find(".//body[@name='target']")
    for joint in target.findall("joint"):
        target.remove(joint)
    return mujoco.MjModel.from_xml_string(ET.tostring(tree, "unicode"))


class PlainLoop:
    "One arm and one target, stepped by mj_step; observation and reward are read off MuJoCo's own site and body."

    def __init__(self, arm, target):
        self.model = plain_model()
        self.model.body("target").pos[:2] = target
        self.data = mujoco.MjData(self.model)
        self.data.qpos[:] = arm
        mujoco.mj_forward(self.model, self.data)

    def observe(self):
        q, v = self.data.qpos, self.data.qvel
        tip, target = self.data.site("fingertip").xpos[:2], self.data.body("target").xpos[:2]
        return np.concatenate([np.sin(q), np.cos(q), 0.15 * v, tip, target, tip - target])

    def step(self, action):
        self.data.ctrl[:] = action
        for _ in range(SKIP):
            mujoco.mj_step(self.model, self.data)
        mujoco.mj_kinematics(self.model, self.data)
        tip, target = self.data.site("fingertip").xpos[:2], self.data.body("target").xpos[:2]
        return self.observe(), float(np.abs(tip - target).sum() < 0.1)


def both(threads, n=N, seed=3):
    "The lock-step environment at its start, and plain loops from the same starts."
    vec = tasks.lock_step(FAMILY, [0] * n, threads=threads)
    obs, _ = vec.reset(seed=seed)
    q, _ = vec._split(vec._state)
    return vec, obs, [PlainLoop(row[:2], row[2:]) for row in q]


def servo(obs):
    "Torques towards the target: the Jacobian's transpose times the way to go, less a damping. (N, 12) -> (N, 2)."
    q, v, way = np.arctan2(obs[:, :2], obs[:, 2:4]), obs[:, 4:6] / 0.15, -obs[:, 10:]
    upper, lower = q[:, 0] + 0.785, q.sum(1)
    by_elbow = 0.45 * np.stack([-np.sin(lower), np.cos(lower)], -1)
    by_shoulder = by_elbow + 0.6 * np.stack([-np.sin(upper), np.cos(upper)], -1)
    torque = 20 * np.stack([(by_shoulder * way).sum(-1), (by_elbow * way).sum(-1)], -1) - 2 * v
    return np.clip(torque, -1, 1).astype(np.float32)


# ---- the model


def test_integrator(model):
    "RK4 at 0.01 s, without gravity; 15 physics steps a step, 100 steps an episode; reacher_2d.xml and reacher_2d.py."
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 and model.opt.timestep == 0.01
    assert not model.opt.gravity.any()
    assert (BODIES["reacher2d"].frame_skip, BODIES["reacher2d"].dt, FAMILY.horizon) == (15, 0.15, 100)


def test_joints(model):
    "Hinges about z with damping 1 and armature 0.05; only the elbow is limited, to -2 .. 3.5 rad; reacher_2d.xml."
    shoulder, elbow = model.joint("shoulder"), model.joint("elbow")
    for joint in (shoulder, elbow):
        assert (joint.type[0], *joint.axis) == (mujoco.mjtJoint.mjJNT_HINGE, 0, 0, 1)
        assert (joint.damping[0], joint.armature[0]) == (1, 0.05)
    assert (shoulder.limited[0], elbow.limited[0], *elbow.range) == (0, 1, -2.0, 3.5)


def test_motors(model):
    "Gear 1, control -1 .. 1, on shoulder and elbow; reacher_2d.xml."
    assert model.nu == 2 and model.actuator_gear[:, 0].tolist() == [1, 1]
    assert model.actuator_ctrllimited.all() and model.actuator_ctrlrange.tolist() == [[-1, 1], [-1, 1]]
    assert [model.joint(i).name for i in model.actuator_trnid[:, 0]] == ["shoulder", "elbow"]


def test_bodies(model):
    "The shoulder at (0, 0, -0.075), turned 0.785 rad about z; the elbow at 0.6, turned back; reacher_2d.xml."
    upper, lower = model.body("upper"), model.body("lower")
    assert upper.pos.tolist() == [0, 0, -0.075] and lower.pos.tolist() == [0.6, 0, 0]
    turned = [2 * np.arctan2(body.quat[3], body.quat[0]) for body in (upper, lower)]
    assert turned == pytest.approx([0.785, -0.785])
    assert model.site("fingertip").pos.tolist() == [0.45, 0, 0]


def test_capsules(model):
    "Radius and half length of root, upper and lower link: 0.1, 0.1; 0.05, 0.3; 0.05, 0.2; reacher_2d.xml."
    capsules = model.geom_size[model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE, :2]
    np.testing.assert_allclose(capsules, [[0.1, 0.1], [0.05, 0.3], [0.05, 0.2]])
    volume = [np.pi * r**2 * (2 * half + 4 * r / 3) for r, half in capsules[1:]]
    masses = [model.body("upper").mass[0], model.body("lower").mass[0]]
    assert masses == pytest.approx([1000 * v for v in volume])  # density 1000


def test_contacts(model):
    "On for root, floor (at z -0.15) and both links, frictionless; off for the target; reacher_2d.xml."
    on = model.geom_contype.astype(bool)
    assert on.sum() == 4 and (model.geom_conaffinity.astype(bool) == on).all()
    assert not on[model.body("target").geomadr[0]]
    assert (model.geom_condim[on] == 1).all() and np.allclose(model.geom_friction[on], [1, 0.1, 0.1])
    assert model.geom("floor").pos[2] == -0.15


def test_shoulder_inertia(model):
    "2.88 kg m² at qpos 0, where the arm that this one replaces had 0.60; the audit of LaMo's released model."
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    full = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, full, data.qM)
    assert round(full[0, 0], 2) == 2.88


def test_fingertip_is_the_models_site(model):
    data = mujoco.MjData(model)
    for q in np.random.default_rng(0).uniform(-2, 2, (20, 4)):
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(fingertip(q[None])[0], data.site("fingertip").xpos[:2], atol=1e-12)


# ---- the episode


def test_starts():
    "Joints uniform in -2 .. 2, at rest; the target uniform in area over the ring from 0.5 to 1 m; reacher_2d.py."
    vec = tasks.lock_step(FAMILY, [0] * 4000, threads=1)
    vec.reset(seed=0)
    q, v = vec._split(vec._state)
    vec.close()
    radius = np.linalg.norm(q[:, 2:], axis=1)
    assert not v.any() and 0.5 <= radius.min() and radius.max() <= 1.0
    assert 1.99 < np.abs(q[:, :2]).max() <= 2 and np.abs(q[:, :2]).mean() == pytest.approx(1, abs=0.03)
    assert (radius**2).mean() == pytest.approx((0.25 + 1) / 2, abs=0.01)  # uniform in radius: 0.583


@pytest.mark.parametrize("threads", [1, 2])
def test_states_are_those_of_a_plain_loop(threads):
    "Within 1e-9 over whole episodes of random and of full torques, observations and rewards likewise."
    vec, obs, loops = both(threads)
    np.testing.assert_allclose(obs, [loop.observe() for loop in loops], atol=1e-6)
    g, bends = np.random.default_rng(0), []
    for t in range(STEPS):
        full = np.array([0.0, 1.0 if t < 50 else -1.0])  # drives the elbow into both its limits
        actions = np.where(np.arange(N)[:, None] % 2, full, g.uniform(-1, 1, (N, 2))).astype(np.float32)
        obs, rewards, ended, _, _ = vec.step(actions)
        want, paid = zip(*(loop.step(a) for loop, a in zip(loops, actions)))
        q, v = vec._split(vec._state)
        np.testing.assert_allclose(q[:, :2], [loop.data.qpos for loop in loops], atol=1e-9)
        np.testing.assert_allclose(v[:, :2], [loop.data.qvel for loop in loops], atol=1e-9)
        np.testing.assert_allclose(obs, want, atol=1e-6)  # float32
        assert rewards.tolist() == list(paid) and not ended.any()
        bends.append(q[:, 1])
    vec.close()
    assert np.max(bends) > 3.4 and np.min(bends) < -1.9


def test_a_servo_earns_the_same():
    "As in the plain loop, episode by episode, and about what the audit's servo earned in the released model: 62.8."
    vec, obs, loops = both(threads=2, n=40)
    ours = plain = np.zeros(40)
    seen = np.stack([loop.observe() for loop in loops])
    for _ in range(STEPS):
        obs, rewards, *_ = vec.step(servo(obs))
        steps = [loop.step(a) for loop, a in zip(loops, servo(seen.astype(np.float32)))]
        seen = np.stack([o for o, _ in steps])
        ours, plain = ours + rewards, plain + [r for _, r in steps]
    vec.close()
    assert ours.tolist() == plain.tolist()
    assert 55 < ours.mean() < 75 and ours.max() <= 100


def test_it_never_ends_early_and_pays_no_effort():
    "reacher_2d.py: no control cost, never done."
    env = gym.make(FAMILY.env_id, disable_env_checker=True)
    env.reset(seed=0)
    steps = [env.step(np.ones(2, np.float32)) for _ in range(STEPS)]
    env.close()
    assert not any(s[2] for s in steps) and [s[3] for s in steps] == [False] * 99 + [True]
    assert {s[1] for s in steps} <= {0.0, 1.0}


def test_its_score_is_its_return():
    "Return / 100 in the code: random 0, expert 100 in the paper's Table 5."
    assert FAMILY.references == (0.0, 100.0) and tasks.normalised(36.0, FAMILY.references) == 36.0


# ---- the data


def test_the_card():
    "Medium near the 36.0 of LaMo's agent (App. D); the expert clearly above it, at random nothing is earned."
    card, policy = experts.load_card(FAMILY), experts.load_expert(FAMILY)
    medium = policy.snapshots[policy.snapshot("medium")]["mean_return"]
    assert medium == pytest.approx(36.0, abs=5)
    assert card["expert_mean_return"] > 60 and card["expert_mean_return"] > 1.5 * medium
    assert card["random_mean_return"] < 2
    assert "shaping" in card["command"] and card["settings"]["shaping"] > 0  # how it was made


def test_shaping_reaches_the_learner_alone():
    "The learner's reward is the environment's minus the distance times the weight; the environment's stays sparse."
    settings = experts.PPOSettings(envs=5, shaping=2.0, threads=1)
    shaped, plain = (experts.GoalEpisodes(FAMILY, s) for s in (settings, replace(settings, shaping=0.0)))
    shaped.reset(), plain.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 5, 2)):
        seen, learnt, _, _ = shaped.step(action)
        _, paid, _, _ = plain.step(action)
        assert set(paid) <= {0.0, 1.0}
        np.testing.assert_allclose(learnt, paid - 2 * np.abs(seen[:, -2:]).sum(-1), atol=1e-6)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    "(the Store of 50 episodes, the manifest's entry): LaMo's dataset."
    root = tmp_path_factory.mktemp("medium")
    (entry,) = collect.collect(FAMILY, "medium", 50, root=root, threads=1, say=lambda *_: None).values()
    return data.load(FAMILY, "medium", root=root), entry


def test_only_episodes_above_20_are_kept(medium):
    "As LaMo's collector does (App. D); rewards are 0 and 1."
    store, entry = medium
    assert len(store) == entry["episodes"] == 50 and entry["policy"].endswith("above 20")
    assert store.returns.min() > 20 and set(store.r.unique().tolist()) == {0.0, 1.0}


def test_the_target_is_within_the_datas_reach(medium):
    "76, LaMo's higher target (Table 6), is earned by some medium episode."
    best = medium[0].returns.numpy()
    assert best.max() >= FAMILY.target_return == 76
    assert collect.target_fact(FAMILY, dict(medium=best)).startswith("target return 76: reached by episodes of medium")
    assert "above every episode here, up to 40.0 (medium)" in collect.target_fact(FAMILY, dict(medium=np.full(3, 40.0)))


def test_which_are_kept_does_not_depend_on_how_many_are_wanted(medium, tmp_path):
    collect.collect(FAMILY, "medium", 7, root=tmp_path, threads=2, say=lambda *_: None)
    few = data.load(FAMILY, "medium", root=tmp_path)
    np.testing.assert_array_equal(few.s, medium[0].s[: len(few.s)])


def test_the_first_kept_game_can_be_played_again(medium):
    "From the start that the manifest names, by its actions: what a film of the dataset shows."
    store, entry = medium
    env = gym.make(FAMILY.env_id, disable_env_checker=True)
    obs, _ = env.reset(seed=collect.start_seed(FAMILY, 0, "medium", entry["seed"], entry["first_game"]))
    for t in range(STEPS):
        np.testing.assert_array_equal(obs, store.s[t])
        obs, *_ = env.step(store.a[t].numpy())
    env.close()


def test_a_policy_that_never_passes_is_refused(monkeypatch):
    "After ten chunks, in one line."
    monkeypatch.setitem(experts.KEPT_ABOVE, ("reacher2d", "random"), 100.0)
    short = replace(FAMILY, horizon=2, chunk=3)
    with pytest.raises(PromptnbError, match="reacher2d random: none of 30 episodes had a return above 100"):
        list(collect.play_chunks(short, 0, "random", 2, seed=0, threads=1))
