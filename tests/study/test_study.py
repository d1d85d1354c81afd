"""The settings of a study and its runs."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.studies import ABLATION, SETTINGS, written

from sb3_vpg.study.__main__ import parse_arguments, study_of
from sb3_vpg.study.study import FIRST_SEARCH_SEED, Run, make_study, read_settings, varied

SMALL = {"environments": ["CartPole-v1"], "seeds": 2}


def final_runs(study, chosen=None):
    return list(study.final_runs(study.environments, study.contestants, chosen or {}))


def test_the_ablation_has_each_step_once_and_most_differ_in_one_keyword():
    study = make_study(read_settings(ABLATION))
    assert len({yaml.safe_dump(dict(setting)) for setting in study.settings.values()}) == len(study.settings)
    changed = {
        ("total_return", "reward_to_go"): {"estimator"},
        ("reward_to_go", "mean_baseline"): {"baseline"},
        ("mean_baseline", "batch_normalized"): {"baseline", "normalize_advantage"},
        ("batch_normalized", "episode_normalized"): {"normalize_advantage"},
        ("reward_to_go", "time_baseline"): {"baseline"},
        ("time_baseline", "leave_one_out"): {"baseline"},
        ("time_baseline", "value_baseline"): {"baseline"},
        ("value_baseline", "gae"): {"estimator", "baseline", "gae_lambda"},
        ("gae", "td_residual"): {"estimator", "gae_lambda"},
        ("gae", "gae_normalized"): {"normalize_advantage"},
        ("gae_normalized", "gae_normalized_32_steps"): {"n_episodes", "n_steps"},
        ("batch_normalized", "gamma_t"): {"discount_state_distribution"},
    }
    assert {tuple(pair[:2]) for pair in study.pairs} == set(changed)
    assert set().union(*changed) == set(study.settings)
    for (one, other), expected in changed.items():
        a, b = (study.keywords("CartPole-v1", "vpg", name) for name in (one, other))
        assert {key for key in {*a, *b} if a.get(key) != b.get(key)} == expected, (one, other)


def test_defaults_are_three_algorithms_with_their_entries():
    study = make_study({})
    assert final_runs(study) == [
        Run("final", "CartPole-v1", algorithm, "", seed) for seed in range(4) for algorithm in ("vpg", "a2c", "ppo")
    ]
    assert study.keywords("CartPole-v1", "vpg", "") == {}


def test_settings_are_those_of_vpg_and_the_others_are_references():
    study = make_study({**SMALL, "algorithms": ["vpg", "ppo"], "settings": {"a": {"gamma": 0.9}, "b": {}}})
    assert study.contestants == {"a": ("vpg", "a"), "b": ("vpg", "b"), "ppo": ("ppo", "")}
    both = make_study({**SMALL, "algorithms": ["vpg", "vpg_lstm"], "settings": {"a": {}}})
    assert list(both.contestants) == ["vpg a", "vpg_lstm a"]


def test_keywords_of_the_setting_precede_those_of_the_environment_and_of_all():
    study = make_study(
        {
            "environments": {"CartPole-v1": {"gamma": 0.5, "n_steps": 5, "n_timesteps": 100, "score_range": [0, 1]}},
            "algorithms": ["vpg", "ppo"],
            "common": {"gamma": 0.4, "n_steps": 4, "n_envs": 4},
            "settings": {"a": {"gamma": 0.6}},
        }
    )
    assert study.keywords("CartPole-v1", "vpg", "a") == {"gamma": 0.6, "n_steps": 5, "n_envs": 4, "n_timesteps": 100}
    # The budget is that of all, so that they can be compared
    assert study.keywords("CartPole-v1", "ppo", "") == {"n_timesteps": 100}


def test_steps_replace_all_budgets_and_the_class_of_environments_is_that_of_all():
    environments = {"CartPole-v1": {"n_timesteps": 100}, "CartPoleSwingUp-v1": {"vec_env": "native"}}
    study = make_study({"environments": environments, "steps": 7, "vec_env": "envpool"})
    for algorithm in study.algorithms:
        assert study.keywords("CartPole-v1", algorithm, "") == {
            "n_timesteps": 7,
            "vec_env_class": "sb3_vpg.envs.EnvPoolVecEnv",
            "vec_env_kwargs": {"num_threads": 1},
        }
        own = study.keywords("CartPoleSwingUp-v1", algorithm, "")
        assert own["vec_env_class"] == "sb3_vpg.envs.NativeVecEnv"


def test_searched_are_settings_of_vpg_and_the_final_runs_have_what_was_chosen():
    study = make_study(SETTINGS)
    searched = list(study.search_runs(["CartPole-v1"], ["reward_to_go", "a2c"]))
    assert searched == [Run("search", "CartPole-v1", "vpg", "reward_to_go", FIRST_SEARCH_SEED, rate) for rate in (0.001, 0.01)]
    chosen = {("CartPole-v1", "vpg", "reward_to_go"): 0.01, ("CartPole-v1", "vpg", "gae"): 0.001}
    final = list(study.final_runs(["CartPole-v1"], ["reward_to_go", "a2c"], chosen))
    assert final == [
        Run("final", "CartPole-v1", *contestant, seed, rate)
        for seed in (0, 1)
        for contestant, rate in ((("vpg", "reward_to_go"), 0.01), (("a2c", ""), None))
    ]


def test_gradients_are_measured_at_policies_of_the_settings_that_are_run():
    study, chosen = make_study(SETTINGS), {("CartPole-v1", "vpg", "gae"): 0.001}
    measured = [Run("statistics", "CartPole-v1", "vpg", "gae", 0, 0.001)]
    assert list(study.statistics_runs(["CartPole-v1"], ["reward_to_go", "gae", "a2c"], chosen)) == measured
    assert not list(study.statistics_runs(["CartPole-v1"], ["reward_to_go", "a2c"], chosen))


def test_first_seed_is_that_of_the_final_runs():
    assert {run.seed for run in final_runs(make_study({**SMALL, "first_seed": 100}))} == {100, 101}


def test_vary_gives_all_combinations():
    assert varied(["gae_lambda=0.9,1"]) == {"gae_lambda=0.9": {"gae_lambda": 0.9}, "gae_lambda=1": {"gae_lambda": 1}}
    assert list(varied(["n_steps=8,16", "baseline=null,value"])) == [
        *("n_steps=8, baseline=None", "n_steps=8, baseline=value", "n_steps=16, baseline=None", "n_steps=16, baseline=value")
    ]
    values = varied(["learning_rate=1e-3,lin_0.01", "policy_kwargs='dict(net_arch=[8, 8])'"]).values()
    assert [value["learning_rate"] for value in values] == [0.001, "lin_0.01"]
    assert {value["policy_kwargs"] for value in values} == {"dict(net_arch=[8, 8])"}


def test_arguments_select_a_part_of_a_study_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def selected(*arguments: str):
        monkeypatch.setattr("sys.argv", ["compare", "--config", str(written(SETTINGS, tmp_path)), *arguments])
        return study_of(parse_arguments())[1]

    assert selected() == (["CartPole-v1", "Acrobot-v1"], ["reward_to_go", "gae", "diverges", "a2c"])
    assert selected("--env", "Acrobot-v1", "Acrobot-v1", "--algo", "a2c") == (["Acrobot-v1"], ["a2c"])
    assert selected("--setting", "gae")[1] == ["gae"]
    with pytest.raises(ValueError, match="--algo='ppo' is not known"):
        selected("--algo", "ppo")
    with pytest.raises(ValueError, match="--algo and --setting select nothing together"):
        selected("--algo", "a2c", "--setting", "gae")
    with pytest.raises(ValueError, match="--vary is not allowed with the settings of"):
        selected("--vary", "gamma=1")


def test_arguments_precede_what_a_study_says_of_its_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"environments": {"CartPole-v1": {"vec_env": "native", "n_timesteps": 9}, "Acrobot-v1": None}}
    arguments = ["--vec-env", "envpool", "--steps", "7"]
    monkeypatch.setattr("sys.argv", ["compare", "--config", str(written(settings, tmp_path)), *arguments])
    study, _ = study_of(parse_arguments())
    for environment in settings["environments"]:
        keywords = study.keywords(environment, "a2c", "")
        assert (keywords["vec_env_class"], keywords["n_timesteps"]) == ("sb3_vpg.envs.EnvPoolVecEnv", 7)
    monkeypatch.setattr("sys.argv", ["compare", "--config", str(written({"environments": {"a": 2}}, tmp_path)), *arguments])
    with pytest.raises(ValueError, match="environments: a=2 is not allowed"):
        study_of(parse_arguments())


def test_a_keyword_is_varied_once():
    with pytest.raises(ValueError, match=r"--vary has gamma twice; name all of its values at once: gamma=value,value"):
        varied(["gamma=0.9", "n_steps=8", "gamma=0.99"])


def test_rates_and_policies_that_are_named_twice_run_once():
    search = {"learning_rates": [1e-2, 0.01], "seeds": 1}
    study = make_study({**SETTINGS, "search": search, "statistics": {"policies": ["gae", "gae"], "seeds": 1}})
    assert len(list(study.search_runs(["CartPole-v1"], ["gae"]))) == 1
    assert len(list(study.statistics_runs(["CartPole-v1"], ["gae"], {}))) == 1


@pytest.mark.parametrize("text", ["gae_lambda", "=1", "gae_lambda=", "gae_lambda=]"])
def test_vary_names_what_it_cannot_read(text: str):
    with pytest.raises(ValueError, match=re.escape(f"--vary {text!r}")):
        varied([text])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"environments": ["CartPole-v7"]}, "environment='CartPole-v7' is not known; did you mean 'CartPole-v1'"),
        ({"seed": 3}, "key='seed' is not known; did you mean 'seeds'"),
        ({"seeds": 0}, "seeds=0 is not allowed"),
        ({"steps": 0.5}, "steps=0.5 is not allowed"),
        ({"score": "return"}, "score='return' is not allowed; choose one of 'deterministic_return'"),
        ({"vec_env": "subproc"}, "vec_env='subproc' is not allowed; choose one of None, 'envpool', 'native'"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 1, "vec_env": "a"}}}, "CartPole-v1: vec_env='a' is not allowed"),
        ({"search": {"learning_rates": [0.0]}}, "search: learning_rates=0.0 is not allowed"),
        ({"search": {"rates": [0.1]}}, "search: key='rates' is not known; did you mean 'learning_rates'"),
        ({"search": 3}, "search: key: expected keys and values, got 3"),
        ({"statistics": {"policies": ["gea"]}}, "statistics: policies='gea' is not known; did you mean 'gae'"),
        ({"statistics": {"reference": "ppo"}}, "statistics: reference='ppo' is not known"),
        ({"pairs": [["gae", "a2"]]}, "pairs='a2' is not known; did you mean 'a2c'"),
        ({"pairs": [["gae"]]}, "must be two contestants"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 0}}}, "CartPole-v1: n_timesteps=0"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 1, "score_range": [1, 0]}}}, "CartPole-v1: score_range=0"),
        ({"environments": ["CartPole-v1"]}, "CartPole-v1: n_timesteps is missing"),
        (
            {"algorithms": ["a2c"], "pairs": [], "statistics": {}},
            "reward_to_go, gae, diverges, gae_lambda, gamma, n_envs, n_episodes, policy_kwargs, vec_env_wrapper: settings and",
        ),
        (
            {"algorithms": ["a2c"], "pairs": [], "statistics": {}, "settings": {}, "common": {}, "entries": True},
            "gae_lambda, vec_env_wrapper: settings and keywords are those of VPG",
        ),
        ({"entries": 1}, "entries=1 is not allowed; choose one of True, False"),
        ({"entries": {"ppo": "nowhere.yml"}}, "entries='ppo' is not known; known: 'a2c', 'vpg'"),
        ({"entries": {"vpg": 1}}, "entries: vpg=1 is not allowed; it must be a name"),
        ({"algorithms": None}, "algorithms=None is not allowed; it must be a list"),
        ({"algorithms": "vpg"}, "algorithms='vpg' is not allowed; it must be a list"),
        ({"algorithms": []}, "algorithms is empty"),
        ({"gym_packages": "mine"}, "gym_packages='mine' is not allowed; it must be a list"),
        ({"environments": "CartPole-v1"}, "environments='CartPole-v1' is not allowed; it must be keys and values"),
        ({"environments": {"CartPole-v1": 2}}, "environments: CartPole-v1=2 is not allowed"),
        ({"settings": ["gae"]}, "settings=['gae'] is not allowed; it must be keys and values"),
        ({"settings": {"gae": "gae"}}, "settings: gae='gae' is not allowed"),
        ({"settings": {"a2c": {}}, "pairs": [], "statistics": {}}, "settings: a2c is the name of an algorithm"),
        ({"common": ["gamma"]}, "common=['gamma'] is not allowed"),
        ({"search": {"learning_rates": 0.1}}, "search: learning_rates=0.1 is not allowed; it must be a list"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 1, "score_range": 3}}}, "CartPole-v1: score_range=3"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 1, "score_range": [1, 2, 3]}}}, "it must be two returns"),
        ({"pairs": [["gae", "a2c", {"Expected": "worse"}]]}, "and optionally a question in quotation marks"),
        ({"pairs": [1]}, "and optionally a question in quotation marks"),
        ({"algorithms": [{"vpg": 1}]}, "algorithms={'vpg': 1} is not allowed; it must be a name"),
        ({"gym_packages": [1]}, "gym_packages=1 is not allowed; it must be a name"),
        ({"environments": [{"CartPole-v1": {}}]}, "environments: with keywords, write `name: {keywords}` without the hyphens"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 1, "score_range": ["a", 5]}}}, "CartPole-v1: score_range='a'"),
        (
            {"environments": {"CartPole-v1": {"n_timesteps": 1, "score_range": [-math.inf, 5]}}},
            "CartPole-v1: score_range=-inf",
        ),
        ({"pairs": ["gae"]}, "and optionally a question in quotation marks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_are_named(change: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_study(read_settings(written({**SETTINGS, **change}, tmp_path)))


def test_keywords_of_the_task_hold_for_all_algorithms():
    study = make_study(
        {
            "algorithms": ["vpg", "ppo"],
            "environments": {"Pendulum-v1": {"env_kwargs": {"g": 1.0}, "gamma": 0.9}},
            "common": {"env_wrapper": "a.Wrapper", "n_envs": 3},
            "settings": {"gae": {}},
        }
    )
    task = {"env_kwargs": {"g": 1.0}, "env_wrapper": "a.Wrapper"}
    assert study.keywords("Pendulum-v1", "ppo", "") == task
    assert study.keywords("Pendulum-v1", "vpg", "gae") == {**task, "gamma": 0.9, "n_envs": 3}
    # A setting of VPG precedes all
    study = replace(study, steps=100, settings={"longer": {"n_timesteps": 200, "env_kwargs": {}}})
    longer = study.keywords("Pendulum-v1", "vpg", "longer")
    assert (longer["n_timesteps"], longer["env_kwargs"]) == (200, {})


def test_numbers_with_an_exponent_are_numbers_and_a_studys_own_file_is_read(tmp_path: Path):
    settings = {"search": {"learning_rates": ["1e-3", 0.1]}, "common": {"learning_rate": "2.5E-4", "policy": "1e"}}
    path = written({"format": 2, "study": settings, "versions": {}}, tmp_path)
    assert read_settings(path) == {
        "search": {"learning_rates": [0.001, 0.1]},
        "common": {"learning_rate": 0.00025, "policy": "1e"},
    }


@pytest.mark.parametrize("text", [None, "- 1", "a: [", "3"])
def test_files_that_are_no_settings_are_named(text: str | None, tmp_path: Path):
    path = tmp_path / "settings.yml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_settings(path)
