"""Where no plan was made from errors, a report still says what every rank would have left of a site."""

from bisect import bisect_left

import pytest

from tersely.pipeline import compress


def between(curve, rank):
    """The loss at a rank lies between those of the points around it, as a spectrum only falls."""
    ranks = [point[0] for point in curve]
    place = bisect_left(ranks, rank)
    return curve[place][1], curve[place if ranks[place] == rank else place - 1][1]


@pytest.fixture
def sites(model_folder, text_file, tmp_path):
    def of(method, keep=0.6, **options):
        given = {"keep": keep, "allocate": "uniform", "calibrate": [str(text_file)], "samples": 4, "length": 16}
        report = compress(model_folder(), tmp_path / "out", method=method, **given | options).report
        return report.sites

    return of


@pytest.mark.parametrize("propagate", ["none", "input"])
@pytest.mark.parametrize("pivot", [False, True])
def test_whitening_lies_on_the_spectrum_of_its_outputs(sites, propagate, pivot):
    cut = [s for s in sites("svd_llm", propagate=propagate, options={"pivot": pivot}) if s.amount is not None]
    assert cut
    for site in cut:
        assert site.curve[0] == (0, 1.0)
        assert site.curve[-1][0] == min(site.out_features, site.in_features)
        least, most = between(site.curve, site.amount)
        assert least * 0.999 - 1e-5 <= site.measured_error <= most * 1.001 + 1e-5


@pytest.mark.parametrize("method", ["nsvd", "adasvd", "dobi", "kfac_svd", "aa_svd"])
def test_no_method_lies_below_the_spectrum(sites, method):
    for site in sites(method):
        if site.amount is not None:
            least, _ = between(site.curve, site.amount)
            assert site.measured_error >= least * 0.999 - 1e-5


def test_members_of_a_shared_factor_are_one_spectrum(sites):
    rows = sites("joint_rank", keep=0.5, options={"metric": "gram", "compare": False})
    shared = [site for site in rows if site.out_features is None and site.amount is not None]
    assert shared
    for site in shared:
        least, most = between(site.curve, site.amount)
        assert least * 0.999 - 1e-5 <= site.measured_error <= most * 1.001 + 1e-5


def test_what_is_no_factorisation_has_none(sites):
    assert all(site.curve is None for site in sites("rtn", keep=0.5, options={"group": 8}))


def test_a_plan_made_of_errors_keeps_its_own(sites):
    for site in sites("svd_llm", allocate="greedy"):
        exact = dict(site.curve).get(site.amount)
        assert exact is None or exact == pytest.approx(site.predicted_error, rel=1e-5)
