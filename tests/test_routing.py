"""Which server gets a request: fewest in flight, where the prompt's prefix is, who is up."""

from pipeline.engines.routing import SPARE_REQUESTS, Router


def loads(router: Router) -> list[int]:
    return [server.load for server in router._servers]


def test_new_prompts_go_where_fewest_requests_are_in_flight() -> None:
    router = Router(3)
    assert [router.pick(f"p{n}", 0.0) for n in range(6)] == [0, 1, 2, 0, 1, 2]
    router.finished(1)
    router.finished(1)
    assert [router.pick(f"q{n}", 0.0) for n in range(3)] == [1, 1, 0]
    assert loads(router) == [3, 2, 2]


def test_a_prompt_stays_where_its_prefix_is() -> None:
    router = Router(2)
    assert router.pick("a", 0.0) == 0
    router.finished(0)
    assert router.pick("b", 0.0) == 0
    # Server 1 has nothing to do, and server 0 knows the prompt.
    assert router.pick("a", 0.0) == 0
    assert loads(router) == [2, 0]


def test_a_prompt_moves_only_for_a_server_with_much_less_to_do_and_then_stays_there() -> None:
    router = Router(2)
    assert router.pick("a", 0.0) == 0
    for _ in range(SPARE_REQUESTS):
        assert router.pick("a", 0.0) == 0
    # 9 in flight against none: one more than the spare ones.
    assert router.pick("a", 0.0) == 1
    assert router.pick("a", 0.0) == 1
    assert loads(router) == [SPARE_REQUESTS + 1, 2]


def test_busier_servers_bear_a_quarter_more_before_a_prompt_moves() -> None:
    router = Router(2)
    for n in range(200):
        router.pick(f"p{n}", 0.0)
    for _ in range(SPARE_REQUESTS + 26):
        assert router.pick("p0", 0.0) == 0
    # 134 > 100 x 1.25 + 8
    assert loads(router) == [134, 100]
    assert router.pick("p0", 0.0) == 1


def test_a_server_that_failed_rests_and_then_one_request_tries_it() -> None:
    router = Router(2, rest_s=1.0)
    assert router.pick("a", 0.0) == 0
    router.failed(0, 0.0)
    router.finished(0)
    assert router.has_another(0, 0.5)
    assert not router.has_another(1, 0.5)
    assert [router.pick("a", 0.5), router.pick("b", 0.9)] == [1, 1]
    # "a" lives at server 1 now; a new prompt finds server 0 back, and others wait for its answer.
    assert [router.pick(p, 1.0) for p in ("a", "c", "d")] == [1, 0, 1]
    router.succeeded(0, sent_at=1.0)
    assert router.pick("e", 1.1) == 0


def test_rests_double_up_to_a_bound_and_failures_together_count_once() -> None:
    router = Router(1, rest_s=1.0, longest_rest_s=5.0)
    now, rests = 0.0, []
    for _ in range(5):
        told = [router.failed(0, now) for _ in range(100)]
        assert told == [now == 0.0] + [False] * 99
        rests.append(router._servers[0].rests_until - now)
        now = router._servers[0].rests_until
    assert rests == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_server_rests_as_long_as_it_asks() -> None:
    router = Router(2, rest_s=1.0)
    router.failed(0, 0.0, asked_s=30.0)
    assert not router.has_another(1, 29.0)
    assert router.has_another(1, 30.0)


def test_an_answer_to_an_older_request_does_not_end_a_rest() -> None:
    router = Router(2, rest_s=10.0)
    router.failed(0, now=5.0)
    router.succeeded(0, sent_at=4.0)
    assert not router.has_another(1, 6.0)
    router.succeeded(0, sent_at=5.5)
    assert router.has_another(1, 6.0)


def test_where_every_server_rests_the_first_to_be_back_is_asked() -> None:
    router = Router(3, rest_s=1.0)
    for n, asked_s in enumerate((9.0, 3.0, 6.0)):
        router.failed(n, 0.0, asked_s)
    assert router.pick("a", 0.5) == 1


def test_the_memory_of_prompts_is_bounded_and_forgets_the_oldest() -> None:
    router = Router(2, remembered=3)
    for prompt in ("a", "b", "c", "a", "d"):
        router.finished(router.pick(prompt, 0.0))
    assert list(router._homes) == ["c", "a", "d"]


def test_a_request_does_not_return_to_the_server_that_just_failed_it_while_another_is_up() -> None:
    """Also when that one has rested and has least to do; with one server there is no choice."""
    router = Router(2, rest_s=1.0)
    busy = [router.pick(f"other {n}", 0.0) for n in range(4)]
    failing = router.pick("p", 0.0)
    router.finished(failing)
    for n in busy:
        if n == failing:
            router.finished(n)
    router.failed(failing, 0.0)
    assert router.pick("p", 99.0, avoid=failing) == 1 - failing
    assert Router(1).pick("p", 0.0, avoid=0) == 0
