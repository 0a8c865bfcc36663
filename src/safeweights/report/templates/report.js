"use strict";
(() => {
  const show = (button, on) => {
    button.setAttribute("aria-pressed", String(on));
    button.setAttribute("aria-label", (on ? "Hide: " : "Show: ") + button.dataset.alt);
  };
  document.querySelectorAll("button.veil").forEach((button) => {
    button.disabled = false;
    button.addEventListener("click", () => show(button, button.getAttribute("aria-pressed") !== "true"));
  });
  document.querySelectorAll("button.unveil").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      button.textContent = on ? "Blur all pictures" : "Show all pictures";
      button.closest("section").querySelectorAll("button.veil").forEach((veil) => show(veil, on));
    });
  });
})();
