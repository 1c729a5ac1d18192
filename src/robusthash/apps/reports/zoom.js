// A click, Enter or Space enlarges a picture; another, or Escape, puts it back.
document.addEventListener("click", function (event) {
  var button = event.target.closest("button.zoom"), large = document.querySelector("button.zoom.large");
  if (large) { large.classList.remove("large"); }
  if (button !== null) { button.classList.toggle("large", button !== large); }
});
document.addEventListener("keydown", function (event) {
  var large = document.querySelector("button.zoom.large");
  if (event.key === "Escape") { if (large) { large.classList.remove("large"); } }
});
