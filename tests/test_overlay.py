from frugal.overlay import overlaid


def test_overlays_merge_as_the_command_line_merges_them() -> None:
    adamw = {"optimizer": {"class_path": "A", "init_args": {"lr": 1, "fused": True}}}
    assert overlaid(adamw, {"optimizer": {"lr": 2}}) == {
        "optimizer": {"class_path": "A", "init_args": {"lr": 2, "fused": True}}
    }
    muon = {"optimizer": {"class_path": "B", "init_args": {"lr": 3}}}
    assert overlaid(adamw, muon) == muon
    assert overlaid({"moe": {"top_k": 2}}, {"moe": None}) == {"moe": None}
    assert overlaid({"moe": None}, {"moe": {"top_k": 2}}) == {"moe": {"top_k": 2}}
    assert overlaid({"callbacks+": [1]}, {"callbacks+": [2]}) == {"callbacks+": [1, 2]}
    assert overlaid({"optimizer": {"init_args": {"lr": 1}}}, {"optimizer": {"init_args": {"b": 2}}}) == {
        "optimizer": {"init_args": {"lr": 1, "b": 2}}
    }


def test_a_list_is_added_to_and_a_class_may_be_its_name() -> None:
    assert overlaid({"l": [1]}, {"l+": [2]}) == {"l": [1, 2]}
    assert overlaid({"l+": [1]}, {"l": [2]}) == {"l": [2]}
    assert overlaid({"l": [1]}, {"l+": [3], "l": [2]}) == {"l": [2, 3]}
    assert overlaid({"l": None}, {"l+": 1}) == {"l": [1]}
    adamw = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1}}}
    assert overlaid(adamw, {"optimizer": "AdamW"})["optimizer"]["init_args"] == {"lr": 1}
    assert overlaid(adamw, {"optimizer": "torch.optim.SGD"}) == {"optimizer": {"class_path": "torch.optim.SGD"}}
