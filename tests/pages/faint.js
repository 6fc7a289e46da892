// Every element with text of its own: WCAG's contrast between its colour and the nearest background that is not transparent.
() => {
  const channels = text => {
    const found = text.match(/[\d.]+/g).map(Number);
    return text.startsWith('color(srgb') ? [found[0] * 255, found[1] * 255, found[2] * 255, found[3] ?? 1] : [found[0], found[1], found[2], found[3] ?? 1];
  };
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const back = channels(getComputedStyle(e).backgroundColor);
      if (back[3] > .5) return back;
    }
    return [255, 255, 255, 1];
  };
  const faint = [];
  for (const element of document.querySelectorAll('body, body *')) {
    const own = [...element.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim()).map(n => n.textContent.trim()).join(' ');
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (!own || !box.width || !box.height || style.visibility === 'hidden' || element.closest('script, style, .skip')) continue;
    const [high, low] = [light(channels(style.color)), light(behind(element))].sort((a, b) => b - a);
    const ratio = (high + .05) / (low + .05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)}: ${element.tagName}.${element.className} ${own.slice(0, 40)}`);
  }
  return faint;
}
