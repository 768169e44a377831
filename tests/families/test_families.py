"""Every family has all that the program asks of it, and its name is known wherever names are checked."""

from __future__ import annotations

from dataclasses import fields

import pytest
from infer_command import untrained_components

from sonic.bench.benchmark import bench
from sonic.checkpoint.convert_config import ConvertConfig
from sonic.cli import Entry, compose, group_choices
from sonic.config import ModelConfig, Ranks, help_of
from sonic.families import FAMILIES
from sonic.families.family import WINDOWS_ONLY, Family, family_of
from sonic.inference.infer_config import BenchConfig, InferConfig
from sonic.inference.inputs import InMemory

MODELS = {name: compose(Entry("infer", InferConfig), [f"model={name}"]).model for name in group_choices("model")}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_every_method_and_what_is_asked_of_the_class(name):
    family = family_of(ModelConfig(family=name))  # an abstract class cannot be made
    assert isinstance(family, Family) and type(family) is type(family_of(ModelConfig(family=name)))
    assert family.loads_late in (True, False)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_model_and_every_adapted_model_is_one_of_it(name):
    own = {model.name for model in MODELS.values() if model.family == name}
    assert own and own.issuperset(FAMILIES[name].adapted)


def test_a_family_without_a_method_cannot_be_made():
    class Half(Family):
        loads_late = False

    with pytest.raises(TypeError, match=f"abstract methods? .*{'.*'.join(sorted(Family.__abstractmethods__))}"):
        Half()


def test_an_unknown_family_is_reported_with_the_names_of_the_table():
    with pytest.raises(ValueError, match=f"model.family=zzz is unknown; choose one of: {', '.join(FAMILIES)}"):
        ModelConfig(family="zzz")


def test_the_help_of_the_option_names_every_family():
    (text,) = (help_of(each) for each in fields(ModelConfig) if each.name == "family")
    assert all(f"{name} ({entry.about})" in text for name, entry in FAMILIES.items())


@pytest.mark.parametrize("model", [model for entry in FAMILIES.values() for model in entry.adapted])
def test_a_model_that_is_an_adapter_is_not_converted_without_it(model):
    with pytest.raises(ValueError, match=f"model={model} is Wan2.2-S2V with an adapter; add live_avatar=FOLDER"):
        ConvertConfig(source="a", output="b", model=MODELS[model])


def test_components_with_another_transformer_keep_the_rest():
    components = untrained_components(ModelConfig(resolution=96))
    other = components.with_model(components.model)
    other.load()
    assert type(other) is type(components)
    assert (other.model, other.autoencoder, other.speech) == (components.model, components.autoencoder, components.speech)


@pytest.mark.parametrize("option", WINDOWS_ONLY)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sonic_svd"])
def test_options_of_the_family_of_windows_are_refused_by_the_others(name, option):
    other = "whole" if option == "face.missing" else "2"
    config = compose(Entry("infer", InferConfig), ["model=preview", "image=a.png", "audio=a.wav", f"{option}={other}"])
    with pytest.raises(ValueError, match=f"{option}={other}.*only model=sonic_svd reads it"):
        family_of(ModelConfig(family=name)).open(config, InMemory())


@pytest.mark.parametrize("target", ["fit", "roofline"])
@pytest.mark.parametrize("model", ["preview", "sonic_svd"])
def test_bench_times_transformers_alone(target, model):
    config = compose(Entry("bench", BenchConfig), [f"target={target}", f"model={model}"])
    with pytest.raises(ValueError, match=f"bench {target} .* published transformers, not model={model}; use model=live_avatar_14b"):
        bench(config, 0.0, ranks=Ranks())
