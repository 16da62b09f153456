// The widget manager sets formulas through MathJax 2's queue, which MathJax 3 does not have: pass them on.
document.addEventListener("DOMContentLoaded", () => {
  if (window.MathJax && !MathJax.Hub) {
    MathJax.Hub = { Queue: ([, , element]) => MathJax.startup.promise.then(() => MathJax.typesetPromise([element])) };
  }
});
