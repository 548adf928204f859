// What a reader would see of the page, as numbers; the tests say what they may be.
(() => {
  const rgb = (text) => {
    const parts = (text.match(/[\d.]+(e-?\d+)?/g) || []).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return [parts[0] * scale, parts[1] * scale, parts[2] * scale, parts.length > 3 ? parts[3] : 1];
  };
  const over = (top, ground) => top.slice(0, 3).map((c, i) => c * top[3] + ground[i] * (1 - top[3]));
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgb(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const shown = (element) => element.checkVisibility() && element.getBoundingClientRect().width > 0;
  const scrolls = (element) => {
    for (let e = element; e && e !== document.documentElement; e = e.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };

  const texts = [], pictures = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !shown(element)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect(), style = getComputedStyle(element), svg = element.closest("svg");
    const under = ground(svg ? svg.parentElement : element);
    texts.push({
      text: node.data.trim().slice(0, 60), left: box.left, right: box.right, scrolls: scrolls(element),
      cut: style.overflowX === "hidden" && element.scrollWidth > element.clientWidth,
      contrast: contrast(over(rgb(svg ? style.fill : style.color), under), under),
    });
  }
  for (const svg of document.querySelectorAll("svg")) {
    if (!shown(svg)) continue;
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    pictures.push({
      name: svg.getAttribute("aria-label"), x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height,
      texts: [...svg.querySelectorAll("text")].map((text) => {
        const t = text.getBoundingClientRect();
        return {
          text: text.textContent.trim(), size: parseFloat(getComputedStyle(text).fontSize) * scale,
          out: Math.max(box.left - t.left, t.right - box.right, box.top - t.top, t.bottom - box.bottom),
        };
      }),
    });
  }
  const root = getComputedStyle(document.documentElement);
  const paint = (name) => {
    const probe = document.createElement("i");
    probe.style.color = root.getPropertyValue(name);
    document.body.append(probe);
    const color = rgb(getComputedStyle(probe).color);
    probe.remove();
    return color;
  };
  const paper = paint("--paper");
  const lines = ["--ink", "--blue", "--orange", ...[4, 5, 6, 8, 9].map((i) => `--line-${i}`)];
  return {
    overflow: document.documentElement.scrollWidth - innerWidth,
    ground: luminance(ground(document.body)), texts, pictures,
    lines: Object.fromEntries(lines.map((name) => [name, contrast(paint(name), paper)])),
    boxes: [...document.querySelectorAll("section, header, figure, table")].map((e) => {
      const b = e.getBoundingClientRect();
      return [b.x, b.y, b.width, b.height].map(Math.round);
    }),
    verdicts: [...document.querySelectorAll(".verdicts li")].map((e) => e.querySelector(".change").innerText.trim()),
  };
})()
