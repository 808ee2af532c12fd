"""The node search of the page."""
from helpers.frontend import FrontEnd

ROWS = 10  # that one sees without much scrolling


def test_each_node_is_found_by_what_one_would_type(front: FrontEnd):
    info = {name: node for name, node in front.server.get("/object_info").items() if name.startswith("PPAP")}
    phrases = {(name, phrase) for name, node in info.items() for phrase in [node["display_name"], *node["search_aliases"]]}
    with front.search() as search:
        found = {(name, phrase): search.names(phrase) for name, phrase in sorted(phrases)}
    missed = [(name, phrase, rows[:3]) for (name, phrase), rows in found.items()
              if info[name]["display_name"] not in rows[:ROWS]]
    assert not missed
    assert all(sum(key[0] == name for key in found) >= 5 for name in info)


def test_a_search_for_nonsense_finds_nothing(front: FrontEnd):
    with front.search() as search:
        assert search.names("qqxxzzvvww") == []
