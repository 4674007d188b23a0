// Anthropic's official JavaScript client.
import Anthropic from "@anthropic-ai/sdk";
import { failure, long, model, nobody, question, report, rootURL, schema, short } from "./common.mjs";

const client = new Anthropic({ baseURL: rootURL, apiKey: "any", maxRetries: 0 });
const messages = [{ role: "user", content: question }];
const plain = { model, messages, max_tokens: short, temperature: 0 };
const words = (message) => message.content.map((block) => block.text ?? "").join("");
const whole = await client.messages.create(plain);
const stream = client.messages.stream(plain);
let streamed = "";
stream.on("text", (text) => (streamed += text));
const last = await stream.finalMessage();
const tools = [{ name: "look_up", description: "Looks up.", input_schema: schema }];
const calling = { ...plain, max_tokens: long, tools, tool_choice: { type: "tool", name: "look_up" } };
const called = [await client.messages.create(calling), await client.messages.stream(calling).finalMessage()];
const format = { type: "json_schema", schema };
const structured = await client.messages.create({ ...plain, max_tokens: long, output_config: { format } });
report({
  text: words(whole),
  streamed,
  calls: called.flatMap((message) => message.content.map((block) => block.input)),
  structured: [JSON.parse(words(structured))],
  usage: [whole.usage.output_tokens, last.usage.output_tokens],
  error: await failure(() => client.messages.create({ ...plain, model: nobody })),
});
