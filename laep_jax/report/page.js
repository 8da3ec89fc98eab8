// Shows the figures of the chosen layer. The choice is kept in the address, so that a page that renews itself keeps it.
const choice = document.getElementById("layer");
function show(layer) {
  for (const figure of document.querySelectorAll("[data-layer]")) figure.hidden = figure.dataset.layer !== layer;
}
if (choice) {
  const asked = location.hash.replace("#layer-", "");
  if ([...choice.options].some((option) => option.value === asked)) choice.value = asked;
  choice.addEventListener("change", () => {
    history.replaceState(null, "", "#layer-" + choice.value);
    show(choice.value);
  });
  choice.parentElement.hidden = false;
  show(choice.value);
}
