// Before the page is drawn: the theme that this browser chose, if it chose one. Storage may be refused: then the system's holds.
try {
  const chosen = localStorage.getItem("jaxtune:theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  // the system's theme
}
