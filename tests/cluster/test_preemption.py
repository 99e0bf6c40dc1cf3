import ray.train

from dpt_ray.cluster import preemption as notices


def test_a_notice_asks_for_a_checkpoint_at_once_and_every_ten_seconds_by_the_first_workers_clock(monkeypatch):
    now, notice = [100.0], [None]
    monkeypatch.setattr(notices.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: notice[0])
    first, second = notices.Notices(0), notices.Notices(1)
    assert not first()
    first.saved()
    now[0], notice[0] = 101.0, "a node is drained"
    assert first() and not second()
    first.saved()
    now[0] = 110.0
    assert not first()
    now[0] = 112.0
    assert first()
    first.saved()
    notice[0] = "and another one"
    assert first()
