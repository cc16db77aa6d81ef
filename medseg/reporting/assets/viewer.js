"use strict";

// Scan, reference and prediction of some cases in NiiVue, as radiologists look: the patient's right at the left.
(async () => {
  const viewer = document.getElementById("viewer");
  const canvas = viewer.querySelector("canvas");
  const message = viewer.querySelector(".message");
  const cases = JSON.parse(document.getElementById("viewer-cases").textContent);
  const colors = JSON.parse(document.getElementById("viewer-colors").textContent);
  const buttons = [...viewer.querySelectorAll("button[data-case]")];
  const controls = Object.fromEntries([...viewer.querySelectorAll("input")].map((input) => [input.name, input]));

  const tell = (text) => {
    message.textContent = text;
    message.hidden = !text;
  };
  // An organ's number is its place in the table of colors; 0 is the background.
  const table = (rgb) => ({
    R: [0, ...rgb.map((color) => color[0])],
    G: [0, ...rgb.map((color) => color[1])],
    B: [0, ...rgb.map((color) => color[2])],
    A: [0, ...rgb.map(() => 255)],
    labels: ["", ...rgb.map(() => "")],
  });
  const tables = { prediction: table(colors), reference: table(colors.map(() => [255, 255, 255])) };

  const OUTLINE_ONLY = 0.004; // NiiVue draws an outline whole, however faint the inside
  let nv;
  let shown = {};
  const redraw = () => {
    const visible = ["prediction", "reference"].filter((layer) => shown[layer] && controls[layer].checked);
    shown.prediction.opacity = Math.max(controls.opacity.valueAsNumber / 100, OUTLINE_ONLY);
    if (shown.reference) shown.reference.opacity = OUTLINE_ONLY;
    nv.opts.atlasOutline = visible.length ? 1 : 0;
    if (!visible.length) {
      shown.prediction.opacity = 0; // without any layer NiiVue would go on showing the last one
      visible.push("prediction");
    }
    nv.volumes = [shown.image, ...visible.map((layer) => shown[layer])];
    nv.updateGLVolume();
  };
  const show = async (index) => {
    delete viewer.dataset.ready;
    buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(n === index)));
    tell("Loading the scan …");
    const layers = cases[index].layers;
    const loaded = {};
    for (const [name, base64] of Object.entries(layers)) {
      loaded[name] = await niivue.NVImage.loadFromBase64({ base64, name: `${name}.nii.gz`, colormap: "gray" });
    }
    nv.volumes = [];
    nv.addVolume(loaded.image);
    for (const name of ["prediction", "reference"]) {
      if (!loaded[name]) continue;
      loaded[name].setColormapLabel(tables[name]);
      nv.addVolume(loaded[name]);
    }
    shown = loaded;
    nv.scene.crosshairPos = nv.mm2frac(cases[index].center);
    redraw();
    tell("");
    requestAnimationFrame(() => requestAnimationFrame(() => (viewer.dataset.ready = String(index))));
  };

  const attempt = async (index) => {
    try {
      await show(index);
    } catch (error) {
      tell(`The scan cannot be shown in this browser (${error.message ?? error}). The pictures below show it.`);
      viewer.dataset.failed = String(error);
    }
  };

  if (!document.createElement("canvas").getContext("webgl2")) {
    tell("This browser offers no WebGL 2, which the viewer needs. The pictures below show the same cases.");
    viewer.dataset.failed = "no WebGL 2";
    return;
  }
  nv = new niivue.Niivue({
    isRadiologicalConvention: true,
    sagittalNoseLeft: true,
    isOrientationTextVisible: true,
    showAllOrientationMarkers: true,
    multiplanarShowRender: niivue.SHOW_RENDER.NEVER,
    multiplanarLayout: niivue.MULTIPLANAR_TYPE.ROW,
    multiplanarPadPixels: 6,
    backColor: [0.063, 0.063, 0.063, 1],
    fontColor: [0.93, 0.93, 0.93, 1],
    crosshairColor: [0.49, 0.77, 0.87, 0.45],
    crosshairWidth: 0.3,
    crosshairWidthUnit: "percent",
    dragAndDropEnabled: false,
    scrollRequiresFocus: true, // the page still scrolls over the scan
    loadingText: "",
    logLevel: "error",
  });
  try {
    await nv.attachToCanvas(canvas);
  } catch (error) {
    tell(`The viewer cannot start here (${error.message ?? error}). The pictures below show the same cases.`);
    viewer.dataset.failed = String(error);
    return;
  }
  buttons.forEach((button, index) => button.addEventListener("click", () => attempt(index)));
  for (const input of Object.values(controls)) input.addEventListener("input", redraw);
  viewer.medseg = { nv };
  await attempt(0);
})();
