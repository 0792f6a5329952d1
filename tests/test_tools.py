"""Imports of foreign meshes that need the optional folder of shared data."""

import numpy as np
import pytest

from surgpose.config import shared_dir
from surgpose.schema import HANDLE, HINGE, JAW_L, JAW_R, TIP
from surgpose.synth.mesh_import import export_tool, import_obj, import_surgeonet
from surgpose.synth.obj import read_obj
from surgpose.synth.tools import build_tool, opening_range


@pytest.fixture(scope="module")
def cad():
    folder = shared_dir()
    if folder is None or not (folder / "cad/surgeonet/Nadelhalter.obj").is_file():
        pytest.skip("needs cad/surgeonet of the shared data (SURGPOSE_SHARED, or ../shared)")
    return folder / "cad/surgeonet"


@pytest.fixture(scope="module")
def scan(cad):
    return import_surgeonet(cad / "Nadelhalter.obj", cad / "kps.csv", "Nadelhalter", "needle_holder")


def test_table_counts_vertices_of_the_file(cad):
    obj = read_obj(cad / "Nadelhalter.obj")
    assert len(obj.vertices) == 21906
    assert np.allclose(obj.vertices[0], [0.00019, 0.000005, 0.038528])
    assert set(obj.roles.values()) == {"gold", "steel"}, "gilt rings are told by the colour in the MTL"


def test_scan_lies_in_the_frame_of_a_tool(scan):
    tool = build_tool(scan, opening_range(scan)[0])
    kps = tool.keypoints_m
    assert np.ptp(tool.mesh.vertices[:, 0]) == pytest.approx(0.3155, abs=2e-3)
    assert np.ptp(tool.mesh.vertices[:, 2]) < 5e-3, "flat in z"
    assert np.allclose(kps[HINGE], 0, atol=1e-9) and np.allclose(kps[TIP, 1:], 0, atol=1e-4)
    assert kps[TIP, 0] == pytest.approx(0.040, abs=2e-3) and kps[HANDLE, 0] == pytest.approx(-0.275, abs=2e-3)
    assert kps[JAW_L, 1] > 0 > kps[JAW_R, 1]


@pytest.mark.parametrize("turn", [0, 5, 12, 25])
def test_opening_moves_the_jaws_as_it_should(scan, turn):
    rest, widest = opening_range(scan)
    tool = build_tool(scan, min(rest + turn, widest))
    kps = tool.keypoints_m
    reach = np.linalg.norm(kps[[JAW_L, JAW_R]], axis=1)
    angle = np.degrees(np.arccos(kps[JAW_L] @ kps[JAW_R] / reach.prod()))
    assert angle == pytest.approx(rest + turn, abs=0.01)
    apart = 2 * reach.mean() * np.sin(np.radians(rest + turn) / 2)
    assert np.linalg.norm(kps[JAW_L] - kps[JAW_R]) == pytest.approx(apart, abs=5e-5)
    assert np.allclose(kps[TIP], kps[[JAW_L, JAW_R]].mean(0))
    for jaw in (JAW_L, JAW_R):
        assert np.linalg.norm(tool.mesh.vertices - kps[jaw], axis=1).min() < 1e-9, "a jaw's end is a vertex"
    rings = np.concatenate([m.vertices for k, m in tool.parts.items() if tool.materials[k] == "gold"])
    spread = 0.08 + 2 * 0.27 * np.sin(np.radians(turn) / 2) * 0.95
    assert np.ptp(rings[:, 1]) > spread, "rings go apart with the jaws"


def test_scan_shows_its_keypoints_from_above(scan):
    tool = build_tool(scan, opening_range(scan)[0] + 15)
    for probes, radius in zip(tool.probes_m, tool.probe_radius_m, strict=True):
        for height in (0.5, -0.5):
            eye = probes + [0, 0, height]
            way = np.tile([0, 0, -np.sign(height)], (len(eye), 1))
            hits, ray, _ = tool.mesh.ray.intersects_location(eye, way, multiple_hits=False)
            assert len(hits) == len(probes) and (np.linalg.norm(hits - probes[ray], axis=1) <= radius).all()


def test_scan_survives_export_and_import(scan, tmp_path):
    opening = opening_range(scan)[0] + 10
    back = import_obj(*export_tool(scan, opening, tmp_path, "scan"), "needle_holder")
    for turn in (opening, opening + 8):
        assert np.allclose(build_tool(back, turn).keypoints_m, build_tool(scan, turn).keypoints_m, atol=1e-6)
    assert opening_range(back) == pytest.approx(opening_range(scan))


@pytest.mark.parametrize("name", ["Scissor", "Metzenb", "KlemmeOverholt"])
def test_other_scans_read_as_distractors(cad, name):
    obj = read_obj(cad / f"{name}.obj")
    assert obj.parts and all(len(m.faces) for m in obj.parts.values())


def test_scan_without_sidecar_says_how_to_make_one(cad):
    with pytest.raises(FileNotFoundError, match=r"Scissor.obj needs a sidecar.*write one like .*jaw_L"):
        import_obj(cad / "Scissor.obj", cad / "Scissor_kps.json", "needle_holder")
