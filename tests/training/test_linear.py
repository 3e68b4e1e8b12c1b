"""The linear probe: heads trained together are those trained alone, and the right one is chosen."""

import numpy as np
import torch
import torch.nn.functional as F

from lodeset.training.linear import BATCH, INITIAL, LEARNING_RATES, _trained, linear_probe, probe_features


def test_heads_trained_together_are_those_that_plain_sgd_trains_alone() -> None:
    rng = np.random.default_rng(0)
    x = {
        name: torch.from_numpy(rng.normal(size=(40, width)).astype(np.float32)) for name, width in (("a", 6), ("b", 9))
    }
    codes = torch.from_numpy(rng.integers(0, 3, 40))
    rates, steps = (0.01, 0.1), 7
    together = _trained(x, codes, 3, rates, steps, seed=5)
    for number, rate in enumerate(rates):
        generator = torch.Generator().manual_seed(5)
        weights = {
            name: (INITIAL * torch.randn(3, value.shape[1], generator=generator)).requires_grad_()
            for name, value in x.items()
        }
        biases = {name: torch.zeros(3, requires_grad=True) for name in x}
        optimiser = torch.optim.SGD([*weights.values(), *biases.values()], lr=rate * 40 / BATCH, momentum=0.9)
        for step in range(steps):
            drawn = torch.randint(40, (40,), generator=generator)
            optimiser.param_groups[0]["lr"] = rate * 40 / BATCH * (1 + np.cos(np.pi * step / steps)) / 2
            optimiser.zero_grad()
            for name in x:
                F.cross_entropy(F.linear(x[name][drawn], weights[name], biases[name]), codes[drawn]).backward()
            optimiser.step()
        for name in x:
            torch.testing.assert_close(together[name][0][number], weights[name].detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(together[name][1][number], biases[name].detach(), rtol=1e-4, atol=1e-6)


def planted() -> tuple[dict[str, np.ndarray], list[str], list[int], list[int]]:
    """Three classes; "told" says which, "noise" does not."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 3, 300)
    told = np.eye(3)[codes] * 4 + rng.normal(size=(300, 3))
    inputs = {"noise": rng.normal(size=(300, 8)).astype(np.float32), "told": told.astype(np.float32)}
    return inputs, [f"class {code}" for code in codes], list(range(200)), list(range(200, 300))


def test_the_features_that_tell_the_classes_are_chosen() -> None:
    inputs, labels, gallery, test = planted()
    probe = linear_probe(inputs, labels, gallery, test, steps=200)
    assert probe.features == "told" and probe.lr in LEARNING_RATES and probe.accuracy > 0.9
    assert linear_probe(inputs, labels, gallery, test, steps=200) == probe
    assert linear_probe({"noise": inputs["noise"]}, labels, gallery, test, steps=200).accuracy < 0.5


def test_test_images_have_no_say_in_the_choice() -> None:
    inputs, labels, gallery, test = planted()
    wrong = labels[:200] + labels[200:][::-1]
    ours, theirs = (linear_probe(inputs, some, gallery, test, steps=50) for some in (labels, wrong))
    assert (ours.features, ours.lr) == (theirs.features, theirs.lr)


def test_galleries_of_a_few_images_are_enough_to_run() -> None:
    for count in (1, 2, 6):
        rows = list(range(count))
        x = {"x": np.eye(count + 1, dtype=np.float32)}
        assert 0 <= linear_probe(x, [str(n % 2) for n in range(count + 1)], rows, [count], steps=3).accuracy <= 1


def test_probe_features_have_the_published_widths() -> None:
    layers, patches = np.arange(40, dtype=np.float32).reshape(2, 4, 5), -np.ones((2, 5), np.float32)
    found = probe_features(layers, patches)
    assert {name: values.shape[1] for name, values in found.items()} == {
        "cls": 5, "cls + patches": 10, "4 cls": 20, "4 cls + patches": 25
    }  # fmt: skip
    np.testing.assert_array_equal(found["cls"], layers[:, 3])
    np.testing.assert_array_equal(found["4 cls + patches"][1], np.r_[layers[1].ravel(), patches[1]])
