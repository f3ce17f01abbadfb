/**
 * Bundles the libraries of the chat page into static/vendor: `npm ci && npm run vendor`.
 *
 * One minified ES module a library, so that neither a site nor a page needs npm. MANIFEST.json says what is in each file
 * and what its SHA-384 is, LICENSES.txt under which terms; tests/app/test_vendor.py holds the files to it.
 */

import { createHash } from 'node:crypto';
import { cp, mkdir, readFile, readdir, rm, writeFile } from 'node:fs/promises';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const HERE = dirname(fileURLToPath(import.meta.url));
const OUT = join(HERE, '../../static/vendor');
const MODULES = join(HERE, 'node_modules');

const GRAMMARS = [
  'bash', 'c', 'cpp', 'csharp', 'css', 'diff', 'dockerfile', 'go', 'graphql', 'ini', 'java', 'javascript', 'json', 'kotlin',
  'latex', 'lua', 'makefile', 'markdown', 'perl', 'php', 'python', 'r', 'ruby', 'rust', 'scala', 'sql', 'swift',
  'typescript', 'xml', 'yaml',
];

const ENTRIES = {
  'markdown-it.js': "export { default as MarkdownIt } from 'markdown-it';",
  'lowlight.js': [
    "import { createLowlight } from 'lowlight';",
    ...GRAMMARS.map((name) => `import ${name} from 'highlight.js/lib/languages/${name}';`),
    `export const lowlight = createLowlight({ ${GRAMMARS.join(', ')} });`,
  ].join('\n'),
  'katex.js': "import katex from 'katex'; export const { render } = katex;",
};

/** Return the names of the packages that went into a bundle, by esbuild's list of its inputs. */
function packagesOf(inputs) {
  const names = Object.keys(inputs).map((path) => /node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(path)?.[1]);
  return [...new Set(names.filter(Boolean))].sort();
}

async function describe(name) {
  const found = JSON.parse(await readFile(join(MODULES, name, 'package.json'), 'utf8'));
  return { name, version: found.version, license: found.license };
}

async function licenseOf(name) {
  const files = await readdir(join(MODULES, name));
  const file = files.find((each) => /^licen[sc]e/i.test(each));
  if (!file) throw new Error(`${name} has no licence file`);
  return `${'='.repeat(100)}\n${name}\n\n${(await readFile(join(MODULES, name, file), 'utf8')).trim()}\n`;
}

async function bundle(file, contents) {
  const result = await build({
    stdin: { contents, resolveDir: HERE },
    outfile: join(OUT, file),
    bundle: true,
    minify: true,
    format: 'esm',
    target: 'es2022',
    charset: 'utf8',
    legalComments: 'none',
    metafile: true,
  });
  return packagesOf(result.metafile.inputs);
}

/** KaTeX's style sheet, with the one format of fonts that every browser of this decade reads. */
async function copyKatexStyle() {
  const css = await readFile(join(MODULES, 'katex/dist/katex.min.css'), 'utf8');
  const slim = css.replaceAll(/,url\(fonts\/[^)]+\.(?:woff|ttf)\) format\("[a-z]+"\)/g, '');
  if (/\.(?:woff|ttf)\)/.test(slim)) throw new Error('a font of another format is left in the style sheet');
  await writeFile(join(OUT, 'katex.css'), slim);
  await cp(join(MODULES, 'katex/dist/fonts'), join(OUT, 'fonts'), {
    recursive: true,
    filter: (path) => !/\.(?:woff|ttf)$/.test(path),
  });
}

async function filesBelow(folder) {
  const entries = await readdir(folder, { withFileTypes: true, recursive: true });
  return entries.filter((entry) => entry.isFile()).map((entry) => relative(OUT, join(entry.parentPath, entry.name))).sort();
}

await rm(OUT, { recursive: true, force: true });
await mkdir(OUT, { recursive: true });
const packages = {};
for (const [file, contents] of Object.entries(ENTRIES)) packages[file] = await bundle(file, contents);
await copyKatexStyle();

const names = [...new Set(Object.values(packages).flat())].sort();
await writeFile(join(OUT, 'LICENSES.txt'), (await Promise.all(names.map(licenseOf))).join('\n'));
const manifest = { packages: await Promise.all(names.map(describe)), files: {} };
for (const file of await filesBelow(OUT)) {
  const content = await readFile(join(OUT, file));
  const from = packages[file] ?? (file === 'LICENSES.txt' ? names : ['katex']);
  manifest.files[file] = { bytes: content.length, sha384: createHash('sha384').update(content).digest('base64'), packages: from };
}
await writeFile(join(OUT, 'MANIFEST.json'), `${JSON.stringify(manifest, null, 2)}\n`);
