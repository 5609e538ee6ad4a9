// What a page looks like in this window, as lists of faults and what else the tests compare.
() => {
  const text = (element) => `${element.tagName.toLowerCase()}: ${element.textContent.trim().slice(0, 60)}`;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const box = (element) => element.getBoundingClientRect();
  const visible = (element) => element.checkVisibility() && box(element).width > 0;

  // Text that people read, but for code and signatures.
  const prose = [];
  const shown = []; // elements with text of their own
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !visible(element)) continue;
    if (shown.at(-1) !== element) shown.push(element);
    if (!element.closest("pre, code, dt.sig, math, script, style")) prose.push(walker.currentNode.textContent.trim());
  }

  // Beyond the right edge of the window, and nothing around it that scrolls.
  const width = document.documentElement.clientWidth;
  const scrolls = (element) => element && !element.matches("article") &&
    (["auto", "scroll"].includes(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
  const too_wide = shown.concat(all("img, table, math, pre"))
    .filter((element) => visible(element) && element.closest(".main") && box(element).right > width + 1 &&
      !scrolls(element.parentElement) && !scrolls(element))
    .map(text);
  for (const element of all("html, .content")) { // .content scrolls on a phone
    const excess = element.scrollWidth - element.clientWidth;
    if (excess > 0) too_wide.push(`${element.tagName} by ${excess} px`);
  }

  // The contrast of text, as the Web Content Accessibility Guidelines define it.
  const channels = (color) => color.match(/[\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const over = (color, below) => {
    const [r, g, b, a = 1] = channels(color);
    return [r, g, b].map((c, i) => a * c + (1 - a) * below[i]);
  };
  const backgrounds = new Map([[null, [255, 255, 255]]]);
  const background = (element) => {
    if (!backgrounds.has(element)) {
      const color = getComputedStyle(element).backgroundColor;
      backgrounds.set(element, over(color, background(element.parentElement)));
    }
    return backgrounds.get(element);
  };
  const contrast = (element) => {
    const below = background(element);
    const lights = [luminance(over(getComputedStyle(element).color, below)), luminance(below)];
    return (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
  };
  const faint = [];
  for (const element of shown.filter((element) => element.closest("article"))) {
    const ratio = contrast(element);
    if (ratio < (element.closest("pre") ? 3 : 4.5)) faint.push(`${ratio.toFixed(1)} ${text(element)}`);
  }

  return {
    title: document.title,
    headings: all("h1").length,
    ids: all("[id]").map((element) => element.id),
    links: all("a[href]").filter((a) => a.getAttribute("href") !== "#").map((a) => a.href),
    pictures_seen: all("article img").length,
    pictures: all("img").filter((img) => !(img.complete && img.naturalWidth > 0 && /\w \w/.test(img.alt))).map((img) => img.src),
    formulas_seen: all("math").length,
    formulas: all("math").filter((math) => !(box(math).width > 0 && box(math).height > 0) || math.querySelector("merror"))
      .map(text),
    prose,
    too_wide: too_wide.slice(0, 5),
    faint: [...new Set(faint)],
    without_button: all("div.highlight pre").filter((pre) => !pre.parentElement.querySelector("button.copybtn")).map(text),
  };
}
